use std::{
    io::Write as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use futures::FutureExt as _;

use super::*;

const LOG: &str = "\
2026-01-01T00:00:00.000000001Z stdout F one\n\
2026-01-01T00:00:01.5Z stderr F two\n\
2026-01-01T00:00:02Z stdout P thr\n\
2026-01-01T00:00:02Z stdout F ee\n\
not a log line\n\
2026-01-01T00:00:03Z stdout F \n\
2026-01-01T00:00:04Z stdout F:x five words of it\n";

fn file(content: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(content.as_bytes()).unwrap();
    file
}

async fn read(content: &str, request: LogRequest) -> String {
    let file = file(content);
    let pieces: Vec<_> = open(file.path(), &request, None)
        .await
        .unwrap()
        .collect()
        .await;
    let bytes: Vec<u8> = pieces
        .into_iter()
        .flat_map(|piece| piece.unwrap().to_vec())
        .collect();
    String::from_utf8(bytes).unwrap()
}

#[tokio::test]
async fn partial_lines_are_joined_and_foreign_lines_passed_over() {
    let text = read(LOG, LogRequest::default()).await;
    assert_eq!(text, "one\ntwo\nthree\n\nfive words of it\n");
}

#[tokio::test]
async fn one_stream_alone_is_read() {
    for (source, expected) in [
        (LogSource::Stdout, "one\nthree\n\nfive words of it\n"),
        (LogSource::Stderr, "two\n"),
    ] {
        let request = LogRequest {
            source: Some(source),
            ..LogRequest::default()
        };
        assert_eq!(read(LOG, request).await, expected);
    }
}

#[tokio::test]
async fn tail_counts_lines_of_the_file() {
    for (tail, expected) in [
        (0, ""),
        (1, "five words of it\n"),
        (2, "\nfive words of it\n"),
        (4, "ee\n\nfive words of it\n"),
        (100, "one\ntwo\nthree\n\nfive words of it\n"),
    ] {
        let request = LogRequest {
            tail_lines: Some(tail),
            ..LogRequest::default()
        };
        assert_eq!(read(LOG, request).await, expected, "{tail}");
    }
}

#[tokio::test]
async fn tail_works_over_many_blocks() {
    let lines: String = (0..5000)
        .map(|n| format!("2026-01-01T00:00:00Z stdout F line number {n} of the file\n"))
        .collect();
    let request = LogRequest {
        tail_lines: Some(3000),
        ..LogRequest::default()
    };
    let text = read(&lines, request).await;
    assert_eq!(text.lines().count(), 3000);
    assert!(text.starts_with("line number 2000 of"), "{}", &text[..40]);
}

#[tokio::test]
async fn since_and_timestamps() {
    let since = "2026-01-01T00:00:02Z".parse::<Timestamp>().unwrap();
    let request = LogRequest {
        since_unix_nanos: i64::try_from(since.as_nanosecond()).ok(),
        timestamps: true,
        ..LogRequest::default()
    };
    assert_eq!(
        read(LOG, request).await,
        "2026-01-01T00:00:02Z three\n2026-01-01T00:00:03Z \n2026-01-01T00:00:04Z five words of it\n"
    );
}

#[tokio::test]
async fn limit_cuts_in_the_middle() {
    let request = LogRequest {
        limit_bytes: Some(6),
        ..LogRequest::default()
    };
    assert_eq!(read(LOG, request).await, "one\ntw");
}

#[tokio::test]
async fn a_line_without_end_is_not_shown_and_an_endless_one_not_kept() {
    let cut = format!("{LOG}2026-01-01T00:00:05Z stdout F unfin");
    assert!(!read(&cut, LogRequest::default()).await.contains("unfin"));
    let endless = format!("{LOG}{}", "x".repeat(4 * MAX_LINE));
    assert_eq!(
        read(&endless, LogRequest::default()).await.lines().count(),
        5
    );
}

#[tokio::test]
async fn follow_sees_later_lines_and_ends_with_the_container() {
    let mut file = file("2026-01-01T00:00:00Z stdout F one\n");
    let runs = Arc::new(AtomicBool::new(true));
    let still = runs.clone();
    let request = LogRequest {
        follow: true,
        ..LogRequest::default()
    };
    let ask: StillRuns = Box::new(move || {
        let still = still.clone();
        async move { still.load(Ordering::SeqCst) }.boxed()
    });
    let mut stream = open(file.path(), &request, Some(ask)).await.unwrap();
    assert_eq!(stream.next().await.unwrap().unwrap(), "one\n");
    file.write_all(b"2026-01-01T00:00:01Z stdout F tw").unwrap();
    file.write_all(b"o\n").unwrap();
    assert_eq!(stream.next().await.unwrap().unwrap(), "two\n");
    file.write_all(b"2026-01-01T00:00:02Z stdout F last\n")
        .unwrap();
    runs.store(false, Ordering::SeqCst);
    assert_eq!(stream.next().await.unwrap().unwrap(), "last\n");
    assert!(stream.next().await.is_none());
}

#[tokio::test]
async fn a_termination_message_is_the_end_of_the_log() {
    let lines: String = (0..200)
        .map(|n| format!("2026-01-01T00:00:00Z stderr F {n:0>60}\n"))
        .collect();
    let file = file(&lines);
    let text = tail_text(file.path()).await.unwrap();
    assert_eq!(text.len(), 2048);
    assert!(text.ends_with("0199\n"));
}
