//! Messages on a connection: a line each, bounded by itself and together with those of all other connections.

use std::{io, sync::Arc};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::{
    bytes::{BufMut as _, BytesMut},
    codec::{Decoder, Encoder},
};

/// Every connection has room for so much without asking, in bytes.
const FREE: usize = 16 << 10;
/// What is asked for, in bytes.
const UNIT: usize = 1 << 10;

/// Why a line was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// The connection broke.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It does not end.
    #[error("a message is longer than {0} bytes")]
    Long(usize),
    /// All connections together have no room for it.
    #[error("the messages of all nodes together need more memory than there is for them; trying again helps")]
    Crowded,
    /// It is no text.
    #[error("a message is no text")]
    Text,
}

/// Memory that all connections share for what they have to keep.
#[derive(Clone, Debug)]
pub struct Budget(Arc<Semaphore>);

/// A part of a [`Budget`] that is in use until this is dropped.
pub type Share = OwnedSemaphorePermit;

impl Budget {
    /// So many bytes.
    pub fn new(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new(bytes / UNIT)))
    }

    /// A part for so many bytes.
    pub fn share(&self, bytes: usize) -> Option<Share> {
        let units = u32::try_from(bytes.div_ceil(UNIT)).ok()?;
        self.0.clone().try_acquire_many_owned(units).ok()
    }
}

/// Lines of at most so many bytes.
#[derive(Debug)]
pub struct Lines {
    /// The longest line.
    pub longest: usize,
    budget: Option<Budget>,
    held: Option<Share>,
    /// Where the search for the end goes on.
    searched: usize,
}

impl Lines {
    /// Lines of a side that is trusted with memory.
    pub fn new(longest: usize) -> Self {
        Self { longest, budget: None, held: None, searched: 0 }
    }

    /// Lines that take what is more than a little from a budget while they are not whole.
    pub fn within(longest: usize, budget: Budget) -> Self {
        Self { budget: Some(budget), ..Self::new(longest) }
    }

    /// Makes sure that what has come may be kept.
    fn hold(&mut self, bytes: usize) -> Result<(), LineError> {
        let Some(budget) = self.budget.as_ref().filter(|_| bytes > FREE) else {
            return Ok(());
        };
        let held = self.held.as_ref().map_or(0, |held| held.num_permits() * UNIT);
        if bytes > held {
            // Twice as much each time, as the buffer grows.
            let more = budget.share(bytes.max(2 * held) - held).ok_or(LineError::Crowded)?;
            match &mut self.held {
                Some(held) => held.merge(more),
                none => *none = Some(more),
            }
        }
        Ok(())
    }
}

impl Decoder for Lines {
    type Item = String;
    type Error = LineError;

    fn decode(&mut self, from: &mut BytesMut) -> Result<Option<String>, LineError> {
        let window = from.len().min(self.longest.saturating_add(1));
        let end = from[self.searched.min(window)..window].iter().position(|byte| *byte == b'\n');
        let Some(end) = end.map(|end| end + self.searched) else {
            if from.len() > self.longest {
                return Err(LineError::Long(self.longest));
            }
            self.searched = window;
            self.hold(from.len())?;
            return Ok(None);
        };
        self.searched = 0;
        let line = from.split_to(end + 1);
        let text = std::str::from_utf8(&line[..end]).map_err(|_| LineError::Text)?;
        let text = text.strip_suffix('\r').unwrap_or(text).to_owned();
        drop(line);
        if self.held.take().is_some() {
            // Room for a long line is not kept for the next one.
            *from = BytesMut::from(&from[..]);
        }
        Ok(Some(text))
    }
}

impl Encoder<String> for Lines {
    type Error = LineError;

    fn encode(&mut self, line: String, to: &mut BytesMut) -> Result<(), LineError> {
        to.reserve(line.len() + 1);
        to.put(line.as_bytes());
        to.put_u8(b'\n');
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(lines: &mut Lines, buffer: &mut BytesMut, bytes: &[u8]) -> Result<Vec<String>, LineError> {
        buffer.extend_from_slice(bytes);
        let mut read = Vec::new();
        while let Some(line) = lines.decode(buffer)? {
            read.push(line);
        }
        Ok(read)
    }

    #[test]
    fn lines_come_whole_however_they_are_cut() {
        let text = b"one\r\n\ntwo\nthree";
        for cut in 0..text.len() {
            let (mut lines, mut buffer) = (Lines::new(8), BytesMut::new());
            let mut read = feed(&mut lines, &mut buffer, &text[..cut]).unwrap();
            read.extend(feed(&mut lines, &mut buffer, &text[cut..]).unwrap());
            assert_eq!(read, ["one", "", "two"], "cut at {cut}");
            assert_eq!(&buffer[..], b"three");
        }
    }

    #[test]
    fn a_line_without_an_end_is_refused_and_one_of_full_length_is_not() {
        let mut full = vec![b'x'; 100];
        full.push(b'\n');
        assert_eq!(feed(&mut Lines::new(100), &mut BytesMut::new(), &full).unwrap().len(), 1);
        for (longest, bytes) in [(99, &full[..]), (99, &full[..100])] {
            let read = feed(&mut Lines::new(longest), &mut BytesMut::new(), bytes);
            assert!(matches!(read, Err(LineError::Long(99))), "{read:?}");
        }
        let read = feed(&mut Lines::new(100), &mut BytesMut::new(), b"\xff\n");
        assert!(matches!(read, Err(LineError::Text)), "{read:?}");
    }

    #[test]
    fn all_together_have_room_for_so_much() {
        let budget = Budget::new(96 << 10);
        let mut talks: Vec<(Lines, BytesMut)> =
            (0..3).map(|_| (Lines::within(1 << 20, budget.clone()), BytesMut::new())).collect();
        let half = vec![b'x'; 40 << 10];
        for (lines, buffer) in &mut talks[..2] {
            assert!(feed(lines, buffer, &half).unwrap().is_empty());
        }
        // A little always fits, much does not while others hold it.
        let (lines, buffer) = &mut talks[2];
        assert!(feed(lines, buffer, &half[..FREE]).unwrap().is_empty());
        assert!(matches!(feed(lines, buffer, &half), Err(LineError::Crowded)));
        // Who has said what he had to, or has gone, gives it back.
        let (lines, buffer) = &mut talks[0];
        assert_eq!(feed(lines, buffer, b"\n").unwrap().len(), 1);
        assert!(buffer.capacity() < FREE);
        talks.remove(1);
        assert!(budget.share(96 << 10).is_some());
    }
}
