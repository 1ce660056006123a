//! Frames of SPDY/3.1 (draft "SPDY Protocol - Draft 3.1", section 2).

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Largest frame that is accepted.
const MAX_FRAME: usize = 1 << 20;

const FIN: u8 = 1;

/// Bytes that are no frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// Another version of the protocol.
    #[error("SPDY version {0}, only 3 is spoken")]
    Version(u16),
    /// Longer than accepted.
    #[error("a frame of {0} bytes; at most {MAX_FRAME} are accepted")]
    TooLong(usize),
    /// A rule is broken.
    #[error("invalid frame: {0}")]
    Invalid(&'static str),
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Opens a stream.
    SynStream {
        /// Stream id.
        stream: u32,
        /// The sender half-closes at once.
        fin: bool,
        /// Compressed headers.
        block: Bytes,
    },
    /// Accepts a stream.
    SynReply {
        /// Stream id.
        stream: u32,
        /// The sender half-closes at once.
        fin: bool,
        /// Compressed headers.
        block: Bytes,
    },
    /// Ends a stream.
    RstStream {
        /// Stream id.
        stream: u32,
        /// Why.
        status: u32,
    },
    /// To be sent back.
    Ping(u32),
    /// No more streams.
    GoAway {
        /// Last stream that was accepted.
        last: u32,
        /// Why.
        status: u32,
    },
    /// More headers of a stream.
    Headers {
        /// Stream id.
        stream: u32,
        /// Compressed headers.
        block: Bytes,
    },
    /// Bytes of a stream.
    Data {
        /// Stream id.
        stream: u32,
        /// The sender half-closes.
        fin: bool,
        /// Bytes.
        data: Bytes,
    },
    /// SETTINGS, WINDOW_UPDATE and unknown control frames, which are passed over.
    Other,
}

impl Frame {
    /// Length of the payload that follows these eight bytes.
    pub fn payload_length(head: [u8; 8]) -> Result<usize, FrameError> {
        let length = usize::from(head[5]) << 16 | usize::from(head[6]) << 8 | usize::from(head[7]);
        if length > MAX_FRAME {
            Err(FrameError::TooLong(length))
        } else {
            Ok(length)
        }
    }

    /// Reads a frame from its first eight bytes and its payload.
    pub fn decode(head: [u8; 8], mut payload: Bytes) -> Result<Self, FrameError> {
        let first = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
        let fin = head[4] & FIN != 0;
        if first & 0x8000_0000 == 0 {
            if first == 0 {
                return Err(FrameError::Invalid("data for stream 0"));
            }
            return Ok(Self::Data {
                stream: first,
                fin,
                data: payload,
            });
        }
        let version = u16::from_be_bytes([head[0] & 0x7f, head[1]]);
        if version != 3 {
            return Err(FrameError::Version(version));
        }
        let mut word = || {
            payload
                .try_get_u32()
                .map_err(|_short| FrameError::Invalid("a control frame is cut off"))
        };
        let id = |word: u32| match word & 0x7fff_ffff {
            0 => Err(FrameError::Invalid("stream 0")),
            id => Ok(id),
        };
        Ok(match u16::from_be_bytes([head[2], head[3]]) {
            1 => {
                let stream = id(word()?)?;
                word()?;
                if payload.remaining() < 2 {
                    return Err(FrameError::Invalid("a SYN_STREAM is cut off"));
                }
                payload.advance(2);
                Self::SynStream {
                    stream,
                    fin,
                    block: payload,
                }
            }
            2 => Self::SynReply {
                stream: id(word()?)?,
                fin,
                block: payload,
            },
            3 => Self::RstStream {
                stream: id(word()?)?,
                status: word()?,
            },
            6 => Self::Ping(word()?),
            7 => Self::GoAway {
                last: word()? & 0x7fff_ffff,
                status: word()?,
            },
            8 => Self::Headers {
                stream: id(word()?)?,
                block: payload,
            },
            _ => Self::Other,
        })
    }

    /// The frame's bytes.
    pub fn encode(&self) -> Bytes {
        match self {
            Self::Data { stream, fin, data } => {
                let mut out = BytesMut::with_capacity(8 + data.len());
                out.put_u32(*stream);
                out.put_u32(u32::from(*fin) << 24 | length(data.len()));
                out.extend_from_slice(data);
                out.freeze()
            }
            Self::SynStream { stream, fin, block } => control(1, *fin, |out| {
                out.put_u32(*stream);
                out.put_u32(0);
                out.put_u16(0);
                out.extend_from_slice(block);
            }),
            Self::SynReply { stream, fin, block } => control(2, *fin, |out| {
                out.put_u32(*stream);
                out.extend_from_slice(block);
            }),
            Self::RstStream { stream, status } => control(3, false, |out| {
                out.put_u32(*stream);
                out.put_u32(*status);
            }),
            Self::Ping(id) => control(6, false, |out| out.put_u32(*id)),
            Self::GoAway { last, status } => control(7, false, |out| {
                out.put_u32(*last);
                out.put_u32(*status);
            }),
            Self::Headers { stream, block } => control(8, false, |out| {
                out.put_u32(*stream);
                out.extend_from_slice(block);
            }),
            // An empty SETTINGS frame.
            Self::Other => control(4, false, |out| out.put_u32(0)),
        }
    }
}

/// Payloads are made here and far below 2^24 bytes.
fn length(bytes: usize) -> u32 {
    u32::try_from(bytes)
        .ok()
        .filter(|n| *n < 1 << 24)
        .expect("frames are cut below 16 MiB")
}

fn control(kind: u16, fin: bool, body: impl FnOnce(&mut BytesMut)) -> Bytes {
    let mut payload = BytesMut::new();
    body(&mut payload);
    let mut out = BytesMut::with_capacity(8 + payload.len());
    out.put_u16(0x8003);
    out.put_u16(kind);
    out.put_u32(u32::from(fin) << 24 | length(payload.len()));
    out.extend_from_slice(&payload);
    out.freeze()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(bytes: &[u8]) -> Result<Frame, FrameError> {
        let head: [u8; 8] = bytes[..8].try_into().unwrap();
        let length = Frame::payload_length(head)?;
        Frame::decode(head, Bytes::copy_from_slice(&bytes[8..8 + length]))
    }

    #[test]
    fn frames_come_back_as_they_were() {
        let block = Bytes::from_static(b"block");
        for frame in [
            Frame::SynStream {
                stream: 1,
                fin: true,
                block: block.clone(),
            },
            Frame::SynReply {
                stream: 1,
                fin: false,
                block: block.clone(),
            },
            Frame::RstStream {
                stream: 3,
                status: 5,
            },
            Frame::Ping(7),
            Frame::GoAway { last: 9, status: 0 },
            Frame::Headers {
                stream: 5,
                block: block.clone(),
            },
            Frame::Data {
                stream: 5,
                fin: true,
                data: block,
            },
        ] {
            assert_eq!(decode(&frame.encode()), Ok(frame));
        }
    }

    #[test]
    fn other_versions_and_long_frames_are_refused() {
        assert_eq!(
            decode(&[0x80, 2, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1]),
            Err(FrameError::Version(2))
        );
        assert!(Frame::payload_length([0, 0, 0, 1, 0, 0xff, 0xff, 0xff]).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(head: [u8; 8], payload: Vec<u8>) {
            if Frame::payload_length(head).is_ok() {
                let _frame = Frame::decode(head, Bytes::from(payload));
            }
        }
    }
}
