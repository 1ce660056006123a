//! Generates the API's types with a protobuf compiler written in Rust: no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/api.proto");
    let set = protox::compile(["proto/api.proto"], ["proto"])?;
    tonic_prost_build::configure()
        // Calls that are not served answer Unimplemented.
        .generate_default_stubs(true)
        // Equal messages have equal bytes.
        .btree_map(".")
        // The file's comments are Markdown of another house.
        .disable_comments(["."])
        .compile_fds(set)?;
    Ok(())
}
