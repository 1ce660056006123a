//! Lists as streams: the same items, in messages that stay small however many there are.

use futures::stream;
use tonic::{Response, Status, codegen::BoxStream};

/// Items of one message.
const PAGE: usize = 128;

/// Sends all items and ends, as the API wants it: no client waits for what comes later.
pub(crate) fn pages<T, M: Send + 'static>(
    items: Vec<T>,
    page: impl Fn(Vec<T>) -> M,
) -> Result<Response<BoxStream<M>>, Status> {
    let mut items = items.into_iter();
    let mut pages = Vec::new();
    while items.len() > 0 {
        pages.push(Ok(page(items.by_ref().take(PAGE).collect())));
    }
    Ok(Response::new(Box::pin(stream::iter(pages))))
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    #[tokio::test]
    async fn all_items_come_once_and_in_order() {
        for count in [0, 1, PAGE, PAGE + 1, 5 * PAGE] {
            let items: Vec<usize> = (0..count).collect();
            let stream = pages(items.clone(), |page| page).unwrap().into_inner();
            let got: Vec<Vec<usize>> = stream.map(Result::unwrap).collect().await;
            assert!(got.iter().all(|page| (1..=PAGE).contains(&page.len())));
            assert_eq!(got.concat(), items);
        }
    }
}
