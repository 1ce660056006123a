//! Bytes of one output stream that the node has not acknowledged, at absolute offsets.

use std::collections::VecDeque;

/// See the module.
#[derive(Debug)]
pub(crate) struct Ring {
    data: VecDeque<u8>,
    /// Offset of the first byte of `data`.
    base: u64,
    capacity: usize,
    eof: bool,
}

impl Ring {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            data: VecDeque::new(),
            base: 0,
            capacity,
            eof: false,
        }
    }

    /// Bytes that may be pushed.
    pub(crate) fn room(&self) -> usize {
        self.capacity.saturating_sub(self.data.len())
    }

    /// Offset behind the last byte.
    pub(crate) fn end(&self) -> u64 {
        self.base + self.data.len() as u64
    }

    pub(crate) fn eof(&self) -> bool {
        self.eof
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.data.extend(bytes);
    }

    /// No more bytes will come.
    pub(crate) fn finish(&mut self) {
        self.eof = true;
    }

    /// Forgets everything before an offset. Offsets of the past and beyond the end do no harm.
    pub(crate) fn acknowledge(&mut self, offset: u64) {
        let taken = offset.min(self.end()).saturating_sub(self.base);
        self.data.drain(
            ..usize::try_from(taken)
                .unwrap_or(usize::MAX)
                .min(self.data.len()),
        );
        self.base += taken;
        // An idle container should not keep its peak.
        if self.data.is_empty() && self.data.capacity() > 64 * 1024 {
            self.data = VecDeque::new();
        }
    }

    /// Bytes from an offset on, and where they really start: what was acknowledged is gone.
    pub(crate) fn read(&self, from: u64, most: usize) -> (u64, Vec<u8>) {
        let from = from.clamp(self.base, self.end());
        let skip = usize::try_from(from - self.base).unwrap_or(usize::MAX);
        let (front, back) = self.data.as_slices();
        let rest = [
            front.get(skip..).unwrap_or_default(),
            &back[skip.saturating_sub(front.len()).min(back.len())..],
        ];
        let mut bytes = Vec::with_capacity(most.min(rest[0].len() + rest[1].len()));
        for part in rest {
            bytes.extend_from_slice(&part[..part.len().min(most - bytes.len())]);
        }
        (from, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_stay_until_they_are_acknowledged() {
        let mut ring = Ring::new(8);
        ring.push(b"abcdef");
        assert_eq!(ring.room(), 2);
        assert_eq!(ring.read(0, 4), (0, b"abcd".to_vec()));
        assert_eq!(ring.read(4, 100), (4, b"ef".to_vec()));
        ring.acknowledge(4);
        ring.push(b"ghijkl");
        assert_eq!(ring.room(), 0);
        assert_eq!(ring.read(0, 100), (4, b"efghijkl".to_vec()));
        assert_eq!(ring.read(9, 2), (9, b"jk".to_vec()));
        ring.acknowledge(2);
        assert_eq!(
            ring.read(0, 1).0,
            4,
            "an old acknowledgement changes nothing"
        );
        ring.acknowledge(u64::MAX);
        assert_eq!((ring.room(), ring.end()), (8, 12));
        assert_eq!(ring.read(50, 5), (12, vec![]));
    }

    #[test]
    fn every_split_of_the_ring_reads_the_same() {
        for shift in 0..16u64 {
            let mut ring = Ring::new(16);
            ring.push(&vec![0; usize::try_from(shift).unwrap()]);
            ring.acknowledge(shift);
            let data: Vec<u8> = (0..16).collect();
            ring.push(&data);
            for from in 0..=16usize {
                for most in 0..=16usize {
                    let (at, bytes) = ring.read(shift + from as u64, most);
                    assert_eq!(at, shift + from as u64);
                    assert_eq!(bytes, data[from..(from + most).min(16)]);
                }
            }
        }
    }
}
