use super::*;
use tokio::io::duplex;

#[test]
fn a_line_is_found_however_it_is_cut() {
    let nonce = Nonce::random();
    let mut bytes = b"\x1eHNSYNC1 noise \x1e\x1eHNECHO1 ".to_vec();
    bytes.extend(nonce.line(SYNC));
    bytes.extend(b"rest");
    for cut in 0..bytes.len() {
        let mut finder = Finder::new(SYNC);
        let found = finder
            .feed_all(&bytes[..cut])
            .or_else(|| finder.feed_all(&bytes[cut..]));
        assert_eq!(found.map(|(nonce, _)| nonce), Some(nonce), "cut at {cut}");
    }
}

#[test]
fn a_damaged_line_is_none() {
    let line = Nonce::random().line(SYNC);
    for at in 0..LINE {
        let mut bad = line;
        bad[at] ^= 1;
        assert!(Finder::new(SYNC).feed_all(&bad).is_none(), "byte {at}");
    }
}

#[tokio::test]
async fn both_sides_meet_through_stale_bytes() {
    let (mut node, mut guest) = duplex(1 << 20);
    let stale = Nonce::random();
    let mut junk = vec![0xff; 100_000];
    junk.extend(stale.line(SYNC));
    junk.extend(&stale.line(SYNC)[..20]);
    node.write_all(&junk).await.unwrap();
    guest.write_all(b"HTTP/2 leftovers").await.unwrap();
    guest.write_all(&stale.line(ECHO)).await.unwrap();
    guest.write_all(&stale.line(ECHO)[..30]).await.unwrap();

    let node = tokio::spawn(async move {
        let (mut node, wire) = host_sync(node).await.unwrap();
        assert_eq!(wire, Wire::Frames);
        node.write_all(b"PRI * ping").await.unwrap();
        let mut pong = [0; 4];
        node.read_exact(&mut pong).await.unwrap();
        assert_eq!(&pong, b"pong");
    });
    let mut guest = guest_sync(guest).await.unwrap();
    let mut ping = [0; 10];
    guest.read_exact(&mut ping).await.unwrap();
    assert_eq!(&ping, b"PRI * ping");
    guest.write_all(b"pong").await.unwrap();
    node.await.unwrap();
}

#[tokio::test]
async fn duplicate_lines_do_not_reach_the_session() {
    let (mut node, guest) = duplex(4096);
    let guest = tokio::spawn(guest_sync(guest));
    let nonce = Nonce::random();
    // Byte by byte with yields, so that the guest sees every possible cut.
    for byte in [nonce.line(SYNC), nonce.line(SYNC), nonce.line(SYNC)].concat() {
        node.write_all(&[byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    node.write_all(b"PRI").await.unwrap();
    let mut guest = guest.await.unwrap().unwrap();
    let mut first = [0; 3];
    guest.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"PRI");
    let mut echo = [0; LINE];
    node.read_exact(&mut echo).await.unwrap();
    assert_eq!(echo, nonce.line(ECHO));
    drop(guest);
    assert_eq!(
        node.read(&mut echo).await.unwrap(),
        0,
        "one echo for one nonce"
    );
}

#[tokio::test]
async fn a_new_node_ends_the_session_inside_a_frame() {
    let (mut node, guest) = duplex(4096);
    let guest = tokio::spawn(guest_sync(guest));
    node.write_all(&Nonce::random().line(SYNC)).await.unwrap();
    node.write_all(b"half a frame").await.unwrap();
    let mut guest = guest.await.unwrap().unwrap();
    node.write_all(&Nonce::random().line(SYNC)).await.unwrap();
    let mut all = Vec::new();
    let error = guest.read_to_end(&mut all).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_line_without_an_answer_is_answered_in_the_next_session() {
    // Once because the line came inside a session, once because the stream broke before the answer.
    for in_session in [true, false] {
        let unanswered = Unanswered::default();
        let nonce = Nonce::random();
        let (mut node, guest) = duplex(4096);
        if in_session {
            node.write_all(&Nonce::random().line(SYNC)).await.unwrap();
            node.write_all(b"frame").await.unwrap();
            let mut guest = guest_sync_again(guest, &unanswered).await.unwrap();
            node.write_all(&nonce.line(SYNC)).await.unwrap();
            guest.read_to_end(&mut Vec::new()).await.unwrap_err();
        } else {
            node.write_all(&nonce.line(SYNC)).await.unwrap();
            drop(node);
            let error = guest_sync_again(guest, &unanswered).await.unwrap_err();
            assert!(matches!(error, SyncError::Io(_)), "{error}");
        }
        let (mut node, guest) = duplex(4096);
        let guest = tokio::spawn(async move { guest_sync_again(guest, &unanswered).await });
        let mut echo = [0; LINE];
        node.read_exact(&mut echo).await.unwrap();
        assert_eq!(echo, nonce.line(ECHO));
        node.write_all(b"PRI").await.unwrap();
        let mut first = [0; 3];
        let mut session = guest.await.unwrap().unwrap();
        session.read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"PRI");
    }
}

#[tokio::test]
async fn a_flooding_guest_is_cut_off() {
    let (node, mut guest) = duplex(1 << 16);
    let flood = tokio::spawn(async move {
        let junk = vec![0x1e; 1 << 16];
        while guest.write_all(&junk).await.is_ok() {}
    });
    let error = host_sync(node).await.map(drop).unwrap_err();
    assert!(matches!(error, SyncError::Flooded), "{error}");
    flood.await.unwrap();
}
