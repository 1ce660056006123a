//! What is shown while layers move: bars on a terminal, lines elsewhere.

use std::collections::HashMap;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;

use super::library::short;
use crate::terminal;

/// Words of one direction.
#[derive(Debug, Clone, Copy)]
pub(super) struct Words {
    pub(super) begins: &'static str,
    pub(super) moves: &'static str,
    pub(super) existed: &'static str,
    pub(super) done: &'static str,
}

pub(super) const PULL: Words = Words {
    begins: "Pulling fs layer",
    moves: "Downloading",
    existed: "Already exists",
    done: "Pull complete",
};
pub(super) const PUSH: Words = Words {
    begins: "Preparing",
    moves: "Pushing",
    existed: "Layer already exists",
    done: "Pushed",
};

pub(super) struct Layers {
    words: Words,
    quiet: bool,
    bars: Option<MultiProgress>,
    layers: HashMap<String, ProgressBar>,
}

impl Layers {
    pub(super) fn new(words: Words, quiet: bool) -> Self {
        let bars = (!quiet && terminal::stdout_is_terminal())
            .then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stdout()));
        Self {
            words,
            quiet,
            bars,
            layers: HashMap::new(),
        }
    }

    /// Shows one event of the API.
    pub(super) fn show(&mut self, event: &Value) {
        if self.quiet {
            return;
        }
        let layer = event["layer"].as_str().unwrap_or_default();
        match event["type"].as_str() {
            Some("RESOLVED") => {
                for layer in event["layers"].as_array().into_iter().flatten() {
                    let digest = layer["digest"].as_str().unwrap_or_default();
                    self.begin(digest, layer["size"].as_u64().unwrap_or_default());
                }
            }
            Some("PROGRESS") => {
                if let Some(bar) = self.layers.get(layer) {
                    bar.set_message(self.words.moves);
                    bar.set_position(event["bytes"].as_u64().unwrap_or_default());
                }
            }
            Some("LAYER") => {
                let word = match event["existed"].as_bool() {
                    Some(true) => self.words.existed,
                    _ => self.words.done,
                };
                match self.layers.get(layer) {
                    Some(bar) => {
                        bar.set_style(plain());
                        bar.finish_with_message(word);
                    }
                    None => terminal::line(&format!("{}: {word}", short(layer))),
                }
            }
            _ => {}
        }
    }

    fn begin(&mut self, digest: &str, size: u64) {
        let Some(bars) = &self.bars else {
            terminal::line(&format!("{}: {}", short(digest), self.words.begins));
            return;
        };
        if self.layers.contains_key(digest) {
            return;
        }
        let style =
            ProgressStyle::with_template("{prefix}: {msg:11} [{bar:40}] {bytes}/{total_bytes}")
                .unwrap_or_else(|_wrong| ProgressStyle::default_bar())
                .progress_chars("=> ");
        let bar = bars.add(ProgressBar::new(size).with_style(style));
        bar.set_prefix(short(digest));
        bar.set_message(self.words.begins);
        self.layers.insert(digest.to_owned(), bar);
    }
}

fn plain() -> ProgressStyle {
    ProgressStyle::with_template("{prefix}: {msg}")
        .unwrap_or_else(|_wrong| ProgressStyle::default_bar())
}
