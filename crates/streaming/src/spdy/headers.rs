//! Header blocks of SPDY/3: name and value pairs, compressed with a dictionary and one zlib
//! context for each direction of a connection (SPDY/3.1, 2.6.10).

use std::sync::LazyLock;

use bytes::{BufMut, Bytes};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::Headers;

/// Largest header block after decompression.
const MAX_BLOCK: usize = 16 << 10;

/// The words of the dictionary that carry a length, in the order of the specification.
const WORDS: &[&str] = &[
    "options",
    "head",
    "post",
    "put",
    "delete",
    "trace",
    "accept",
    "accept-charset",
    "accept-encoding",
    "accept-language",
    "accept-ranges",
    "age",
    "allow",
    "authorization",
    "cache-control",
    "connection",
    "content-base",
    "content-encoding",
    "content-language",
    "content-length",
    "content-location",
    "content-md5",
    "content-range",
    "content-type",
    "date",
    "etag",
    "expect",
    "expires",
    "from",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "last-modified",
    "location",
    "max-forwards",
    "pragma",
    "proxy-authenticate",
    "proxy-authorization",
    "range",
    "referer",
    "retry-after",
    "server",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "vary",
    "via",
    "warning",
    "www-authenticate",
    "method",
    "get",
    "status",
    "200 OK",
    "version",
    "HTTP/1.1",
    "url",
    "public",
    "set-cookie",
    "keep-alive",
    "origin",
];

/// The rest of the dictionary.
const TAIL: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

static DICTIONARY: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut dictionary = Vec::with_capacity(1423);
    for word in WORDS {
        dictionary.put_u32(u32::try_from(word.len()).expect("words are short"));
        dictionary.extend_from_slice(word.as_bytes());
    }
    dictionary.extend_from_slice(TAIL.as_bytes());
    dictionary
});

/// A header block that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Not what zlib wrote.
    #[error("a header block cannot be decompressed")]
    Compression,
    /// More than accepted.
    #[error("a header block is larger than {MAX_BLOCK} bytes")]
    TooLarge,
    /// Not pairs of names and values.
    #[error("a header block is malformed")]
    Malformed,
}

/// Compression state of one side of a connection, both directions.
pub struct HeaderCodec {
    deflate: Compress,
    inflate: Decompress,
}

impl std::fmt::Debug for HeaderCodec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HeaderCodec")
    }
}

impl Default for HeaderCodec {
    fn default() -> Self {
        Self::new()
    }
}

impl HeaderCodec {
    /// State of a new connection.
    pub fn new() -> Self {
        let mut deflate = Compress::new(Compression::default(), true);
        deflate
            .set_dictionary(&DICTIONARY)
            .expect("a fresh zlib stream takes a dictionary");
        Self {
            deflate,
            inflate: Decompress::new(true),
        }
    }

    /// Compresses a block.
    pub fn encode(&mut self, headers: &Headers) -> Bytes {
        let mut plain = Vec::new();
        let number = |n: usize| u32::try_from(n).expect("headers are short");
        plain.put_u32(number(headers.len()));
        for (name, value) in headers {
            for text in [name, value] {
                plain.put_u32(number(text.len()));
                plain.extend_from_slice(text.as_bytes());
            }
        }
        let mut out = Vec::with_capacity(plain.len() + 64);
        let start = self.deflate.total_in();
        loop {
            let done = usize::try_from(self.deflate.total_in() - start).expect("a block is short");
            let room = out.capacity() - out.len();
            self.deflate
                .compress_vec(&plain[done..], &mut out, FlushCompress::Sync)
                .expect("deflate of memory cannot fail");
            if out.capacity() > out.len() && room > 0 {
                return Bytes::from(out);
            }
            out.reserve(256);
        }
    }

    /// Decompresses a block.
    pub fn decode(&mut self, block: &[u8]) -> Result<Headers, HeaderError> {
        let mut plain = vec![0; MAX_BLOCK + 1];
        let (mut read, mut written) = (0, 0);
        while read < block.len() {
            let (before_in, before_out) = (self.inflate.total_in(), self.inflate.total_out());
            let result = self.inflate.decompress(
                &block[read..],
                &mut plain[written..],
                FlushDecompress::Sync,
            );
            let advance = |after: u64, before: u64| {
                usize::try_from(after - before).map_err(|_other| HeaderError::Compression)
            };
            read += advance(self.inflate.total_in(), before_in)?;
            written += advance(self.inflate.total_out(), before_out)?;
            match result {
                Ok(Status::Ok | Status::BufError) if written > MAX_BLOCK => {
                    return Err(HeaderError::TooLarge);
                }
                Ok(Status::Ok) => {}
                Ok(Status::BufError) => break,
                Ok(Status::StreamEnd) => return Err(HeaderError::Compression),
                Err(error) if error.needs_dictionary().is_some() => {
                    self.inflate
                        .set_dictionary(&DICTIONARY)
                        .map_err(|_wrong| HeaderError::Compression)?;
                }
                Err(_) => return Err(HeaderError::Compression),
            }
        }
        parse(&plain[..written])
    }
}

fn parse(mut plain: &[u8]) -> Result<Headers, HeaderError> {
    fn number(plain: &mut &[u8]) -> Result<usize, HeaderError> {
        let (head, rest) = plain.split_at_checked(4).ok_or(HeaderError::Malformed)?;
        *plain = rest;
        let bytes: [u8; 4] = head.try_into().map_err(|_other| HeaderError::Malformed)?;
        usize::try_from(u32::from_be_bytes(bytes)).map_err(|_other| HeaderError::Malformed)
    }
    fn text(plain: &mut &[u8]) -> Result<String, HeaderError> {
        let length = number(plain)?;
        let (head, rest) = plain
            .split_at_checked(length)
            .ok_or(HeaderError::Malformed)?;
        *plain = rest;
        String::from_utf8(head.to_vec()).map_err(|_other| HeaderError::Malformed)
    }
    let pairs = number(&mut plain)?;
    let mut headers = Headers::new();
    for _ in 0..pairs {
        let name = text(&mut plain)?.to_ascii_lowercase();
        let value = text(&mut plain)?;
        headers.insert(name, value);
    }
    Ok(headers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dictionary_is_the_specifications() {
        // Length and Adler-32 as every SPDY/3 stream announces them.
        let (mut a, mut b) = (1u32, 0u32);
        for byte in DICTIONARY.iter() {
            a = (a + u32::from(*byte)) % 65521;
            b = (b + a) % 65521;
        }
        assert_eq!((DICTIONARY.len(), b << 16 | a), (1423, 0xe3c6_a7c2));
    }

    #[test]
    fn blocks_share_one_context() {
        let (mut client, mut server) = (HeaderCodec::new(), HeaderCodec::new());
        for number in 0..50 {
            let headers = Headers::from([
                ("streamtype".to_owned(), "data".to_owned()),
                ("port".to_owned(), "8080".to_owned()),
                ("requestid".to_owned(), number.to_string()),
            ]);
            let block = client.encode(&headers);
            assert_eq!(server.decode(&block), Ok(headers));
        }
    }

    #[test]
    fn bombs_and_garbage_are_refused() {
        let mut client = HeaderCodec::new();
        let bomb = client.encode(&Headers::from([("a".to_owned(), "x".repeat(1 << 20))]));
        assert!(bomb.len() < 8 << 10);
        assert_eq!(HeaderCodec::new().decode(&bomb), Err(HeaderError::TooLarge));
        assert!(HeaderCodec::new().decode(b"garbage").is_err());
        let cut = HeaderCodec::new().encode(&Headers::from([("a".to_owned(), "b".to_owned())]));
        assert!(HeaderCodec::new().decode(&cut[..cut.len() / 2]).is_err());
    }
}
