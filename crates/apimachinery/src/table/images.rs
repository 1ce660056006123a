//! The columns of images.

use serde_json::Value;

use super::{
    Column,
    columns::{AGE, NAME, string, wide},
    or, text,
};

pub(super) static IMAGES: &[Column] = &[
    NAME,
    string("Image", |object, _| {
        or(text(object, &["spec", "name"]), "<none>").into()
    }),
    string("ID", |object, _| {
        let id = text(object, &["status", "id"]);
        let hex = id.strip_prefix("sha256:").unwrap_or(id);
        hex.chars().take(12).collect::<String>().into()
    }),
    string("Size", |object, _| size(&object["status"]["size"]).into()),
    AGE,
    wide("Digest", |object, _| {
        or(text(object, &["status", "digest"]), "<none>").into()
    }),
    wide("Platform", |object, _| {
        text(object, &["status", "platform"]).into()
    }),
];

/// Bytes in powers of two, to one digit.
fn size(bytes: &Value) -> String {
    let bytes = bytes.as_u64().unwrap_or_default();
    let tenths = |unit: u32| {
        let tenth = (bytes >> (unit - 10)) * 10 / 1024;
        format!("{}.{}", tenth / 10, tenth % 10)
    };
    match bytes {
        0..0x400 => format!("{bytes}"),
        0x400..0x10_0000 => format!("{}Ki", tenths(10)),
        0x10_0000..0x4000_0000 => format!("{}Mi", tenths(20)),
        _ => format!("{}Gi", tenths(30)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::size;

    #[test]
    fn sizes_are_short() {
        for (bytes, text) in [
            (0_u64, "0"),
            (1023, "1023"),
            (1536, "1.5Ki"),
            (3 << 20, "3.0Mi"),
            ((3 << 30) + (1 << 29), "3.5Gi"),
        ] {
            assert_eq!(size(&json!(bytes)), text);
        }
    }
}
