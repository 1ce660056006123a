//! Dependencies between rooms go down only (docs/architecture.md, "The rooms").
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]

use std::{collections::BTreeMap, process::Command};

use serde_json::Value;

/// Floor of each room; 1 is the top. A room may use rooms of a higher number only.
const FLOORS: &[(u8, &[&str])] = &[
    (1, &["hypernetes", "hyper", "hyperstart"]),
    (2, &["apiserver", "controllers", "nodelet", "cri"]),
    (
        3,
        &["runtime", "hostpods", "apimachinery", "policy", "streaming"],
    ),
    (
        4,
        &[
            "image",
            "network",
            "volume",
            "vmm",
            "kernel",
            "container",
            "agent-api",
            "identity",
            "store",
        ],
    ),
    (5, &["types", "telemetry"]),
];

/// Arrows inside one floor that the design names.
const SAME_FLOOR: &[(&str, &str)] = &[
    ("policy", "apimachinery"),
    ("container", "agent-api"),
    ("hostpods", "runtime"),
];

/// The guest stays small: these rooms may use nothing else of the house.
const GUEST: &[(&str, &[&str])] = &[
    ("hyperstart", &["types", "agent-api", "container"]),
    ("container", &["types", "agent-api"]),
];

/// Not part of the product.
const DEV: &[&str] = &["testkit", "tests", "benches"];

fn floors() -> BTreeMap<&'static str, u8> {
    FLOORS
        .iter()
        .flat_map(|(floor, rooms)| rooms.iter().map(move |room| (*room, *floor)))
        .collect()
}

/// What is wrong with the arrow `from` → `to`, if anything.
fn judge(from: &str, to: &str) -> Option<String> {
    let floors = floors();
    let (Some(above), Some(below)) = (floors.get(from), floors.get(to)) else {
        let unknown = if floors.contains_key(from) { to } else { from };
        return Some(format!("room {unknown} has no floor: add it to FLOORS"));
    };
    if let Some((_, allowed)) = GUEST.iter().find(|(room, _)| *room == from)
        && !allowed.contains(&to)
    {
        return Some(format!("{from} runs in the guest and may not use {to}"));
    }
    if above < below || SAME_FLOOR.contains(&(from, to)) {
        return None;
    }
    Some(format!(
        "{from} (floor {above}) may not use {to} (floor {below})"
    ))
}

/// Normal dependencies between rooms, as (from, to).
fn arrows() -> Vec<(String, String)> {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--no-deps",
            "--format-version",
            "1",
            "--offline",
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo metadata runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    let room = |name: &str| match name {
        "hypernetes" => Some(name.to_owned()),
        _ => name.strip_prefix("hypernetes-").map(str::to_owned),
    };
    let mut arrows = Vec::new();
    for package in metadata["packages"].as_array().expect("packages") {
        let Some(from) = room(package["name"].as_str().expect("name")) else {
            continue;
        };
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let normal = dependency["kind"].is_null();
            if let (true, Some(to)) = (normal, room(dependency["name"].as_str().expect("name"))) {
                arrows.push((from.clone(), to));
            }
        }
    }
    arrows
}

#[test]
fn arrows_go_down_only() {
    let arrows = arrows();
    assert!(arrows.len() > 20, "the workspace was not read: {arrows:?}");
    let wrong: Vec<String> = arrows
        .iter()
        .filter(|(from, _)| !DEV.contains(&from.as_str()))
        .filter_map(|(from, to)| judge(from, to))
        .collect();
    assert!(wrong.is_empty(), "wrong arrows:\n{}", wrong.join("\n"));
}

#[test]
fn a_wrong_arrow_is_named_with_both_rooms() {
    let message = judge("vmm", "runtime").expect("an arrow that goes up");
    assert_eq!(message, "vmm (floor 4) may not use runtime (floor 3)");
    assert!(
        judge("image", "network").is_some(),
        "mechanisms do not know each other"
    );
    assert!(
        judge("hyperstart", "telemetry").is_some(),
        "the guest stays small"
    );
    assert!(judge("runtime", "vmm").is_none());
}
