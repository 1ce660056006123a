//! Generates the protocol's types with a protobuf compiler written in Rust: no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/agent.proto");
    let set = protox::compile(["proto/agent.proto"], ["proto"])?;
    // The guest makes no calls, and its end is written by hand: small (`src/server.rs`).
    let client = std::env::var_os("CARGO_FEATURE_CLIENT").is_some();
    tonic_prost_build::configure()
        .build_client(client)
        .build_server(false)
        .compile_fds(set)?;
    Ok(())
}
