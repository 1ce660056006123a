use std::time::Duration;

use proptest::prelude::*;
use tokio::{
    io::{DuplexStream, duplex},
    sync::mpsc,
    time::timeout,
};

use super::*;

const SOON: Duration = Duration::from_secs(5);

/// A node's side at work, and the other end of its stream.
fn node() -> (Shared, DuplexStream) {
    let (stream, other) = duplex(64 * 1024);
    let shared = Shared::new(Side::Node);
    let driver = Driver::new(shared.clone());
    tokio::spawn(driver.run(stream, |_, _| ()));
    (shared, other)
}

fn frame(kind: u8, call: u32, payload: &[u8]) -> Vec<u8> {
    let mut state = Shared::new(Side::Guest);
    let state = Arc::get_mut(&mut state.0).unwrap().get_mut().unwrap();
    state.frame(kind, call, payload);
    state.out.to_vec()
}

async fn receive(shared: &Shared, call: u32) -> Result<Received, ConnectionError> {
    let received = poll_fn(|cx| shared.poll_receive(call, cx));
    timeout(SOON, received).await.expect("an answer")
}

#[tokio::test]
async fn a_question_and_its_end_are_written_at_once() {
    let (shared, mut other) = node();
    let call = shared.begin("Hello").unwrap();
    shared
        .send(call, Bytes::from_static(b"question"))
        .await
        .unwrap();
    shared.finish(call);
    let mut expected = frame(CALL, 1, b"Hello");
    expected.extend(frame(DATA, 1, b"question"));
    expected.extend(frame(END, 1, b""));
    let mut read = vec![0; 1024];
    let count = timeout(SOON, other.read(&mut read)).await.unwrap().unwrap();
    assert_eq!(&read[..count], expected);
}

#[tokio::test]
async fn answers_arrive_in_order_and_the_status_last() {
    let (shared, mut other) = node();
    let call = shared.begin("Events").unwrap();
    let mut answer = frame(ACCEPT, call, b"");
    answer.extend(frame(DATA, call, b"one"));
    answer.extend(frame(DATA, call, b"two"));
    answer.extend(frame(STATUS, call, b"\x05gone"));
    other.write_all(&answer).await.unwrap();
    assert_eq!(shared.accepted(call).await.unwrap(), None);
    let mut data = BytesMut::new();
    let status = loop {
        match receive(&shared, call).await.unwrap() {
            Received::Bytes(bytes) => data.extend(bytes),
            Received::End(status) => break status,
        }
    };
    assert_eq!(data, &b"onetwo"[..]);
    assert_eq!(status, Status::new(Code::NotFound, "gone"));
    // The guest's later bytes for it are nobody's, and do no harm.
    shared.leave(call);
    other.write_all(&frame(DATA, call, b"late")).await.unwrap();
    let next = shared.begin("Stats").unwrap();
    other.write_all(&frame(STATUS, next, b"\0")).await.unwrap();
    let ended = shared.accepted(next).await.unwrap().unwrap();
    assert_eq!(ended.code(), Code::Ok);
}

#[tokio::test]
async fn what_breaks_the_rules_ends_the_connection() {
    let window = vec![0; STREAM_WINDOW];
    let mut flood: Vec<u8> = window
        .chunks(MAX_DATA)
        .flat_map(|piece| frame(DATA, 1, piece))
        .collect();
    flood.extend(frame(DATA, 1, b"!"));
    for (what, bytes) in [
        ("more than the window", flood),
        (
            "a frame that is too long",
            vec![DATA, 0xff, 0xff, 0xff, 0, 0, 0, 1],
        ),
        ("a long status", vec![STATUS, 0, 0xff, 0xff, 0, 0, 0, 1]),
        ("an unknown kind", frame(99, 1, b"")),
        ("a call of the guest's", frame(CALL, 9, b"Hello")),
        ("room that was never taken", frame(ROOM, 1, &[0, 0, 0, 1])),
        ("room without a number", frame(ROOM, 1, b"")),
        ("an empty status", frame(STATUS, 1, b"")),
    ] {
        let (shared, mut other) = node();
        shared.begin("Events").unwrap();
        // Nobody reads of the first call, so nothing is given back; the second hears of the end.
        let call = shared.begin("Stats").unwrap();
        drop(other.write_all(&bytes).await);
        let accepted = timeout(SOON, shared.accepted(call)).await.expect(what);
        let error = accepted.expect_err(what);
        assert!(
            matches!(error, ConnectionError::Protocol(_)),
            "{what}: {error:?}"
        );
        assert!(shared.begin("Stats").is_err(), "{what}");
    }
}

#[tokio::test]
async fn a_sender_waits_for_room_and_ends_with_the_call() {
    let (shared, mut other) = node();
    let call = shared.begin("Stdin").unwrap();
    let sender = {
        let shared = shared.clone();
        let bytes = Bytes::from(vec![7; STREAM_WINDOW + 10]);
        tokio::spawn(async move {
            shared.send(call, bytes).await?;
            shared.finish(call);
            Ok::<_, Status>(())
        })
    };
    // All that there is room for, and no more.
    let frames = STREAM_WINDOW.div_ceil(MAX_DATA);
    let mut first = vec![0; HEADER + b"Stdin".len() + frames * HEADER + STREAM_WINDOW];
    timeout(SOON, other.read_exact(&mut first))
        .await
        .unwrap()
        .unwrap();
    assert!(!sender.is_finished());
    other
        .write_all(&frame(ROOM, call, &10u32.to_be_bytes()))
        .await
        .unwrap();
    let mut rest = vec![0; HEADER + 10 + HEADER];
    timeout(SOON, other.read_exact(&mut rest))
        .await
        .unwrap()
        .unwrap();
    timeout(SOON, sender).await.unwrap().unwrap().unwrap();

    let blocked = shared.begin("Stdin").unwrap();
    let bytes = Bytes::from(vec![7; 2 * STREAM_WINDOW]);
    let send = shared.send(blocked, bytes);
    let end = async {
        let mut sink = vec![0; 64 * 1024];
        other
            .write_all(&frame(STATUS, blocked, b"\x0ano"))
            .await
            .unwrap();
        while let Ok(count) = other.read(&mut sink).await
            && count > 0
        {}
    };
    let sent = tokio::select! {
        sent = timeout(SOON, send) => sent.expect("an end"),
        () = end => panic!("the connection ended"),
    };
    assert_eq!(sent.unwrap_err().code(), Code::Cancelled);
}

#[tokio::test]
async fn a_connection_ends_with_its_last_caller_and_call() {
    let (shared, mut other) = node();
    let call = shared.begin("Events").unwrap();
    shared.flush();
    shared.abandon();
    let mut read = vec![0; 1024];
    let count = timeout(SOON, other.read(&mut read)).await.unwrap().unwrap();
    assert_eq!(&read[..count], frame(CALL, 1, b"Events"));
    shared.leave(call);
    let mut rest = Vec::new();
    timeout(SOON, other.read_to_end(&mut rest))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(rest, frame(CANCEL, 1, b""));
}

/// Bytes that look like frames more often than chance would have it.
fn noise() -> impl Strategy<Value = Vec<u8>> {
    let frames = (0_u8..9, 0_u32..4, prop::collection::vec(any::<u8>(), 0..40))
        .prop_map(|(kind, call, payload)| frame(kind, call, &payload));
    let piece = prop_oneof![
        4 => frames,
        1 => prop::collection::vec(any::<u8>(), 0..20),
    ];
    prop::collection::vec(piece, 0..20).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn no_bytes_break_either_side(bytes in noise(), cut in any::<prop::sample::Index>()) {
        for side in [Side::Node, Side::Guest] {
            let shared = Shared::new(side);
            if side == Side::Node {
                shared.begin("Events").unwrap();
                shared.begin("Output").unwrap();
            }
            let mut parser = Parser::default();
            let entered = shared.clone();
            let mut begin = |call, _: String| entered.enter(call);
            let (head, tail) = bytes.split_at(cut.index(bytes.len() + 1));
            for piece in [head, tail] {
                parser.bytes.extend_from_slice(piece);
                if parser.take(&shared, &mut begin).is_err() {
                    break;
                }
            }
            let state = shared.lock();
            let kept: usize = state.calls.values().map(|slot| slot.incoming.len()).sum();
            prop_assert!(kept <= bytes.len());
        }
    }

    #[test]
    fn all_bytes_arrive_in_order(
        messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..2000), 1..20),
        pipe in 1_usize..5000,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let echoed = runtime.block_on(async {
            let (near, far) = duplex(pipe);
            let (node, guest) = (Shared::new(Side::Node), Shared::new(Side::Guest));
            tokio::spawn(Driver::new(node.clone()).run(near, |_, _| ()));
            let (begun_tx, mut begun) = mpsc::unbounded_channel();
            let entered = guest.clone();
            let begin = move |call, method: String| {
                entered.enter(call);
                drop(begun_tx.send((call, method)));
            };
            tokio::spawn(Driver::new(guest.clone()).run(far, begin));
            let call = node.begin("Forward").unwrap();
            let echo = async {
                let (call, method) = begun.recv().await.unwrap();
                assert_eq!(method, "Forward");
                while let Received::Bytes(bytes) = receive(&guest, call).await.unwrap() {
                    guest.send(call, bytes.freeze()).await.unwrap();
                    guest.flush();
                }
                guest.conclude(call, &Ok(()));
            };
            let send = async {
                for message in &messages {
                    node.send(call, Bytes::from(message.clone())).await.unwrap();
                    node.flush();
                }
                node.finish(call);
            };
            let take = async {
                let mut all = Vec::new();
                while let Received::Bytes(bytes) = receive(&node, call).await.unwrap() {
                    all.extend(bytes);
                }
                all
            };
            tokio::join!(echo, send, take).2
        });
        prop_assert_eq!(echoed, messages.concat());
    }
}
