//! Many calls on one stream, each with a window of its own: what HTTP/2 was used for, in a few
//! frames, because the guest pays for every instruction and every page of this.
//!
//! A frame is a kind (one byte), the length of its payload (three, big-endian), the call's number
//! (four) and the payload:
//!
//! | kind | from | payload |
//! | --- | --- | --- |
//! | `CALL` | node | name of the method, and behind a space, if the call is part of a trace, its `traceparent`; numbers rise from 1 |
//! | `DATA` | both | a piece of the messages of one direction, each as gRPC delimits it: a zero byte, four bytes of length, the message |
//! | `END` | node | empty: no more messages |
//! | `CANCEL` | node | empty: the call is of no interest any more |
//! | `ROOM` | both | four bytes: so many more bytes of `DATA` may be sent, in the call, or in all if its number is 0 |
//! | `ACCEPT` | guest | empty: the call has begun, messages may follow |
//! | `STATUS` | guest | a code and a text: the end of the call |
//!
//! A side that sends more than it has room for, or a kind or number that cannot be, ends the
//! connection. So what a side keeps of the other's bytes is bounded by the windows.

use std::{
    collections::BTreeMap,
    future::poll_fn,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    task::AbortHandle,
};

use crate::status::{Code, Status};

const STREAM_WINDOW: usize = crate::STREAM_WINDOW as usize;
const CONNECTION_WINDOW: usize = crate::CONNECTION_WINDOW as usize;

const CALL: u8 = 1;
const DATA: u8 = 2;
const END: u8 = 3;
const CANCEL: u8 = 4;
const ROOM: u8 = 5;
const ACCEPT: u8 = 6;
const STATUS: u8 = 7;

const HEADER: usize = 8;
/// Largest payload of `DATA`: a chunk of a byte stream with what is around it.
const MAX_DATA: usize = 128 * 1024;
/// Largest payload of another kind.
const MAX_CONTROL: usize = 8 * 1024;
/// Longest text of a status that is sent, in bytes.
const MAX_TEXT: usize = 4 * 1024;
/// Bytes that are read at once.
const READ: usize = 16 * 1024;
/// Encoded bytes that may wait for the stream before senders do.
const BACKLOG: usize = 128 * 1024;
/// A buffer that has grown beyond this is given back when it is empty.
const KEPT: usize = 16 * 1024;

/// Why there are no more calls.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectionError {
    /// The stream is at its end.
    #[error("the agent's stream has ended")]
    Closed,
    /// The stream failed.
    #[error("the agent's stream has failed")]
    Io(#[source] Arc<io::Error>),
    /// The other side broke the rules.
    #[error("the other side {0}")]
    Protocol(&'static str),
}

/// Which end this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Node,
    Guest,
}

/// One call's state.
#[derive(Debug)]
struct Slot {
    /// Bytes that have come and were not taken.
    incoming: BytesMut,
    /// Node: the call was accepted, or more came.
    accepted: bool,
    /// No more bytes come. Node: what the call ended with.
    end: Option<Status>,
    /// Bytes that may still be sent, and that may still come.
    send_room: usize,
    receive_room: usize,
    /// Bytes that were taken and not yet given back as room.
    taken: usize,
    reader: Option<Waker>,
    writer: Option<Waker>,
    /// Guest: the handler. Node: who sends the request's messages.
    task: Option<AbortHandle>,
}

impl Slot {
    fn new() -> Self {
        Self {
            incoming: BytesMut::new(),
            accepted: false,
            end: None,
            send_room: STREAM_WINDOW,
            receive_room: STREAM_WINDOW,
            taken: 0,
            reader: None,
            writer: None,
            task: None,
        }
    }

    fn wake(&mut self) {
        for waker in [self.reader.take(), self.writer.take()]
            .into_iter()
            .flatten()
        {
            waker.wake();
        }
    }

    fn stop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
        self.wake();
    }
}

#[derive(Debug)]
struct State {
    side: Side,
    calls: BTreeMap<u32, Slot>,
    /// The newest call's number.
    newest: u32,
    out: BytesMut,
    send_room: usize,
    receive_room: usize,
    taken: usize,
    driver: Option<Waker>,
    /// Node: nobody can make calls any more.
    abandoned: bool,
    error: Option<ConnectionError>,
}

impl State {
    fn frame(&mut self, kind: u8, call: u32, payload: &[u8]) {
        // Lengths are bounded by the callers, far below three bytes' limit.
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX) & 0x00ff_ffff;
        self.out.reserve(HEADER + payload.len());
        self.out.put_u32(u32::from(kind) << 24 | length);
        self.out.put_u32(call);
        self.out.put_slice(payload);
    }

    /// Has what was framed written.
    fn flush(&mut self) {
        if let Some(driver) = self.driver.take() {
            driver.wake();
        }
    }

    /// Gives bytes back that were taken, in large pieces.
    fn give_back(&mut self, call: u32, count: usize) {
        self.taken += count;
        if self.taken >= CONNECTION_WINDOW / 2 {
            let room = std::mem::take(&mut self.taken);
            self.receive_room += room;
            self.room(0, room);
        }
        let Some(slot) = self.calls.get_mut(&call) else {
            return;
        };
        slot.taken += count;
        if slot.taken >= STREAM_WINDOW / 2 && slot.end.is_none() {
            let room = std::mem::take(&mut slot.taken);
            slot.receive_room += room;
            self.room(call, room);
        }
    }

    fn room(&mut self, call: u32, room: usize) {
        let room = u32::try_from(room).unwrap_or(u32::MAX);
        self.frame(ROOM, call, &room.to_be_bytes());
        self.flush();
    }

    fn remove(&mut self, call: u32) -> bool {
        let Some(mut slot) = self.calls.remove(&call) else {
            return false;
        };
        slot.stop();
        self.give_back(call, slot.incoming.len());
        true
    }

    /// Takes a piece of `DATA`'s payload.
    fn data(&mut self, call: u32, bytes: &[u8]) {
        match self.calls.get_mut(&call) {
            Some(slot) if slot.end.is_none() => {
                slot.incoming.extend_from_slice(bytes);
                slot.accepted = true;
                if let Some(reader) = slot.reader.take() {
                    reader.wake();
                }
            }
            // On its way when the call ended.
            _ => self.give_back(call, bytes.len()),
        }
    }

    /// Checks the header of `DATA` and takes the room that it uses.
    fn admit(&mut self, call: u32, length: usize) -> Result<(), ConnectionError> {
        let flood = ConnectionError::Protocol("sends more than it has room for");
        self.receive_room = self.receive_room.checked_sub(length).ok_or(flood.clone())?;
        if let Some(slot) = self.calls.get_mut(&call) {
            slot.receive_room = slot.receive_room.checked_sub(length).ok_or(flood)?;
        }
        Ok(())
    }

    fn wake_writers(&mut self) {
        for slot in self.calls.values_mut() {
            if let Some(writer) = slot.writer.take() {
                writer.wake();
            }
        }
    }

    fn fail(&mut self, error: ConnectionError) {
        self.error.get_or_insert(error);
        self.calls.values_mut().for_each(Slot::stop);
        self.flush();
    }

    /// A frame that is no `DATA`. A call's number and method if the node began one.
    fn control(
        &mut self,
        kind: u8,
        call: u32,
        payload: &[u8],
    ) -> Result<Option<String>, ConnectionError> {
        let odd = ConnectionError::Protocol("sends a frame that cannot be");
        if kind == ROOM {
            let room = <[u8; 4]>::try_from(payload).map_err(|_odd| odd.clone())?;
            let room = usize::try_from(u32::from_be_bytes(room)).unwrap_or(usize::MAX);
            let (slots, most) = match call {
                0 => (Some(&mut self.send_room), CONNECTION_WINDOW),
                _ => (
                    self.calls.get_mut(&call).map(|slot| &mut slot.send_room),
                    STREAM_WINDOW,
                ),
            };
            if let Some(room_left) = slots {
                *room_left = room_left.saturating_add(room);
                if *room_left > most {
                    return Err(odd);
                }
            }
            self.wake_writers();
            return Ok(None);
        }
        match (self.side, kind) {
            (Side::Guest, CALL) => {
                if call <= self.newest {
                    return Err(odd);
                }
                self.newest = call;
                let method = std::str::from_utf8(payload).map_err(|_odd| odd)?;
                return Ok(Some(method.to_owned()));
            }
            (Side::Guest, END) => {
                if let Some(slot) = self.calls.get_mut(&call) {
                    slot.end = Some(Status::new(Code::Ok, ""));
                    slot.wake();
                }
            }
            (Side::Guest, CANCEL) => {
                self.remove(call);
            }
            (Side::Node, ACCEPT) => {
                if let Some(slot) = self.calls.get_mut(&call) {
                    slot.accepted = true;
                    slot.wake();
                }
            }
            (Side::Node, STATUS) => {
                let (&code, text) = payload.split_first().ok_or(odd)?;
                let text = String::from_utf8_lossy(text).into_owned();
                if let Some(slot) = self.calls.get_mut(&call)
                    && slot.end.is_none()
                {
                    slot.end = Some(Status::new(Code::from(code), text));
                    slot.stop();
                }
            }
            _ => return Err(odd),
        }
        Ok(None)
    }
}

/// What a connection and its calls share.
#[derive(Debug, Clone)]
pub(crate) struct Shared(Arc<Mutex<State>>);

impl Shared {
    pub(crate) fn new(side: Side) -> Self {
        Self(Arc::new(Mutex::new(State {
            side,
            calls: BTreeMap::new(),
            newest: 0,
            out: BytesMut::new(),
            send_room: CONNECTION_WINDOW,
            receive_room: CONNECTION_WINDOW,
            taken: 0,
            driver: None,
            abandoned: false,
            error: None,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Node: begins a call, of which the other side hears at the next [`Shared::flush`].
    pub(crate) fn begin(&self, method: &str) -> Result<u32, ConnectionError> {
        let mut state = self.lock();
        if let Some(error) = &state.error {
            return Err(error.clone());
        }
        let spent = ConnectionError::Protocol("has had four billion calls");
        let call = state.newest.checked_add(1).ok_or(spent)?;
        state.newest = call;
        state.calls.insert(call, Slot::new());
        state.frame(CALL, call, method.as_bytes());
        Ok(call)
    }

    /// Guest: takes a call that the node began.
    pub(crate) fn enter(&self, call: u32) {
        self.lock().calls.insert(call, Slot::new());
    }

    /// How many calls are open.
    pub(crate) fn open(&self) -> usize {
        self.lock().calls.len()
    }

    /// Has a task stopped when the call ends. Stops it at once if it has.
    pub(crate) fn attend(&self, call: u32, task: AbortHandle) {
        let mut state = self.lock();
        // For a guest `end` is only that of what it reads.
        let guest = state.side == Side::Guest;
        match state.calls.get_mut(&call) {
            Some(slot) if guest || slot.end.is_none() => slot.task = Some(task),
            _ => task.abort(),
        }
    }

    /// Node: no more messages of the request.
    pub(crate) fn finish(&self, call: u32) {
        let mut state = self.lock();
        if state.calls.contains_key(&call) {
            state.frame(END, call, &[]);
            state.flush();
        }
    }

    /// Node: the call's answer is of no interest any more.
    pub(crate) fn leave(&self, call: u32) {
        let mut state = self.lock();
        let ended = state
            .calls
            .get(&call)
            .is_some_and(|slot| slot.end.is_some());
        if state.remove(call) && !ended && state.error.is_none() {
            state.frame(CANCEL, call, &[]);
        }
        // The last call of an abandoned connection ends it.
        state.flush();
    }

    /// Node: nobody will make a call any more.
    pub(crate) fn abandon(&self) {
        let mut state = self.lock();
        state.abandoned = true;
        state.flush();
    }

    /// Guest: the call has begun.
    pub(crate) fn accept(&self, call: u32) {
        let mut state = self.lock();
        if state.calls.contains_key(&call) {
            state.frame(ACCEPT, call, &[]);
            state.flush();
        }
    }

    /// Guest: the call has ended.
    pub(crate) fn conclude(&self, call: u32, result: &Result<(), Status>) {
        let (code, text) = match result {
            Ok(()) => (Code::Ok, ""),
            Err(status) => (status.code(), status.message()),
        };
        let text = &text.as_bytes()[..text.floor_char_boundary(MAX_TEXT)];
        let mut payload = Vec::with_capacity(1 + text.len());
        payload.push(code as u8);
        payload.extend_from_slice(text);
        let mut state = self.lock();
        if let Some(slot) = state.calls.get_mut(&call) {
            // This is the task.
            slot.task = None;
        }
        if state.remove(call) {
            state.frame(STATUS, call, &payload);
            state.flush();
        }
    }

    /// Node: waits until the call was accepted or has ended; how it ended, if it was not accepted.
    pub(crate) async fn accepted(&self, call: u32) -> Result<Option<Status>, ConnectionError> {
        poll_fn(|cx| {
            let mut state = self.lock();
            let error = state.error.clone();
            let Some(slot) = state.calls.get_mut(&call) else {
                return Poll::Ready(Err(error.unwrap_or(ConnectionError::Closed)));
            };
            match (&slot.end, error) {
                _ if slot.accepted => Poll::Ready(Ok(None)),
                (Some(end), _) => Poll::Ready(Ok(Some(end.clone()))),
                (None, Some(error)) => Poll::Ready(Err(error)),
                (None, None) => {
                    slot.reader = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }

    /// The bytes that have come, or how the other side ended.
    pub(crate) fn poll_receive(
        &self,
        call: u32,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Received, ConnectionError>> {
        let mut state = self.lock();
        let error = state.error.clone();
        let Some(slot) = state.calls.get_mut(&call) else {
            return Poll::Ready(Err(error.unwrap_or(ConnectionError::Closed)));
        };
        if !slot.incoming.is_empty() {
            let bytes = std::mem::take(&mut slot.incoming);
            state.give_back(call, bytes.len());
            return Poll::Ready(Ok(Received::Bytes(bytes)));
        }
        match (&slot.end, error) {
            (Some(end), _) => Poll::Ready(Ok(Received::End(end.clone()))),
            (None, Some(error)) => Poll::Ready(Err(error)),
            (None, None) => {
                slot.reader = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    /// Has what was sent written.
    pub(crate) fn flush(&self) {
        self.lock().flush();
    }

    /// Sends bytes as there is room: they are written at the next [`Shared::flush`] or when there is no
    /// room. Fails when the call has ended. Cancelled, a part may be sent.
    pub(crate) async fn send(&self, call: u32, mut bytes: Bytes) -> Result<(), Status> {
        poll_fn(|cx| {
            let mut state = self.lock();
            while bytes.has_remaining() {
                let side = state.side;
                let room = state.send_room;
                let full = state.out.len() >= BACKLOG;
                let failed = state.error.is_some();
                let slot = state.calls.get_mut(&call);
                // A guest goes on after the node's END; a node has nobody to send to after STATUS.
                let Some(slot) =
                    slot.filter(|slot| !failed && (side == Side::Guest || slot.end.is_none()))
                else {
                    return Poll::Ready(Err(Status::cancelled("the call has ended")));
                };
                let count = bytes.len().min(MAX_DATA).min(slot.send_room).min(room);
                if count == 0 || full {
                    slot.writer = Some(cx.waker().clone());
                    state.flush();
                    return Poll::Pending;
                }
                slot.send_room -= count;
                state.send_room -= count;
                let piece = bytes.split_to(count);
                state.frame(DATA, call, &piece);
            }
            Poll::Ready(Ok(()))
        })
        .await
    }
}

/// What there is to read of a call.
#[derive(Debug)]
pub(crate) enum Received {
    Bytes(BytesMut),
    /// Guest: the node has no more messages. Node: the call's status.
    End(Status),
}

/// Carries a connection's bytes. Ends, with all its calls, when it is dropped.
#[derive(Debug)]
pub(crate) struct Driver(Shared);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.lock().fail(ConnectionError::Closed);
    }
}

impl Driver {
    pub(crate) fn new(shared: Shared) -> Self {
        Self(shared)
    }

    /// Carries bytes until the stream ends or fails, or nobody is left who could call. `begin` hears of
    /// the calls that the other side begins.
    pub(crate) async fn run<S>(
        self,
        stream: S,
        begin: impl FnMut(u32, String),
    ) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let (reader, writer) = tokio::io::split(stream);
        let result = tokio::select! {
            read = self.read(reader, begin) => read,
            written = self.write(writer) => written.map_err(|error| ConnectionError::Io(Arc::new(error))),
        };
        if let Err(error) = &result {
            self.0.lock().fail(error.clone());
        }
        result
    }

    async fn read(
        &self,
        mut reader: impl AsyncRead + Unpin,
        mut begin: impl FnMut(u32, String),
    ) -> Result<(), ConnectionError> {
        let mut parser = Parser::default();
        loop {
            parser.bytes.reserve(READ);
            let count = reader.read_buf(&mut parser.bytes).await;
            if count.map_err(|error| ConnectionError::Io(Arc::new(error)))? == 0 {
                return Ok(());
            }
            parser.take(&self.0, &mut begin)?;
        }
    }

    async fn write(&self, mut writer: impl AsyncWrite + Unpin) -> io::Result<()> {
        while let Some(mut batch) = poll_fn(|cx| self.poll_batch(cx)).await {
            writer.write_all_buf(&mut batch).await?;
            writer.flush().await?;
            let mut state = self.0.lock();
            if state.out.is_empty() && batch.capacity() <= KEPT {
                state.out = batch;
            }
            state.wake_writers();
        }
        Ok(())
    }

    /// What is to be written, or that there will be nothing.
    fn poll_batch(&self, cx: &mut Context<'_>) -> Poll<Option<BytesMut>> {
        let mut state = self.0.lock();
        if !state.out.is_empty() {
            return Poll::Ready(Some(std::mem::take(&mut state.out)));
        }
        if state.abandoned && state.calls.is_empty() {
            return Poll::Ready(None);
        }
        state.driver = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// Cuts what is read into frames.
#[derive(Debug, Default)]
struct Parser {
    bytes: BytesMut,
    /// Call and rest of the `DATA` that is being read.
    data: Option<(u32, usize)>,
}

impl Parser {
    fn take(
        &mut self,
        shared: &Shared,
        begin: &mut impl FnMut(u32, String),
    ) -> Result<(), ConnectionError> {
        loop {
            if let Some((call, rest)) = self.data {
                let count = rest.min(self.bytes.len());
                shared.lock().data(call, &self.bytes[..count]);
                self.bytes.advance(count);
                self.data = (count < rest).then_some((call, rest - count));
                if self.data.is_some() {
                    return Ok(());
                }
            }
            let Some(mut header) = self.bytes.get(..HEADER) else {
                return Ok(());
            };
            let first = header.get_u32();
            let (kind, length) = ((first >> 24) as u8, (first & 0x00ff_ffff) as usize);
            let call = header.get_u32();
            if length > if kind == DATA { MAX_DATA } else { MAX_CONTROL } {
                return Err(ConnectionError::Protocol("sends a frame that is too long"));
            }
            if kind == DATA {
                shared.lock().admit(call, length)?;
                self.bytes.advance(HEADER);
                self.data = Some((call, length)).filter(|(_, length)| *length > 0);
                continue;
            }
            if self.bytes.len() < HEADER + length {
                return Ok(());
            }
            let frame = self.bytes.split_to(HEADER + length);
            let begun = shared.lock().control(kind, call, &frame[HEADER..])?;
            if let Some(method) = begun {
                begin(call, method);
            }
        }
    }
}

#[cfg(test)]
mod tests;
