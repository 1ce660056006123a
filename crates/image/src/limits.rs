//! What an image may cost this host.

/// Upper bounds on everything that is read from a registry or an archive.
///
/// The defaults take every image that people run and stop what only an attacker sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Files, directories and links of one layer, directories that are only implied included.
    pub max_entries: u64,
    /// Bytes of one layer's tar; a sparse file counts with its full size.
    pub max_layer_size: u64,
    /// Uncompressed bytes per compressed byte, beyond [`Limits::ratio_free_size`].
    pub max_ratio: u64,
    /// Uncompressed bytes for which no ratio is looked at.
    pub ratio_free_size: u64,
    /// Bytes of one PAX extended header.
    pub max_pax_size: u64,
    /// Bytes of a file's extended attributes, names and values together.
    pub max_xattr_size: usize,
    /// Bytes of a manifest or an index.
    pub max_manifest_size: u64,
    /// Bytes of an image's configuration.
    pub max_config_size: u64,
    /// Layers of an image.
    pub max_layers: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_entries: 1_000_000,
            max_layer_size: 64 << 30,
            max_ratio: 200,
            ratio_free_size: 64 << 20,
            max_pax_size: 1 << 20,
            max_xattr_size: 64 << 10,
            max_manifest_size: 4 << 20,
            max_config_size: 8 << 20,
            max_layers: 127,
        }
    }
}
