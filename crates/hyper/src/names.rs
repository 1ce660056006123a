//! Names of containers, and what of them Kubernetes can hold.

use rand::{Rng as _, seq::IndexedRandom as _};

use crate::error::{Failure, Result};

const ADJECTIVES: [&str; 48] = [
    "able", "agile", "amber", "ample", "apt", "bold", "brave", "bright", "brisk", "calm", "candid",
    "clear", "clever", "crisp", "deft", "eager", "early", "exact", "fair", "fleet", "fond",
    "frank", "fresh", "gentle", "glad", "grand", "hardy", "jolly", "keen", "kind", "lively",
    "loyal", "lucid", "merry", "neat", "noble", "patient", "plain", "prompt", "proud", "quick",
    "quiet", "rapid", "ready", "sharp", "steady", "sunny", "warm",
];

/// People who moved mathematics, physics and computing.
const SURNAMES: [&str; 48] = [
    "abel",
    "ampere",
    "babbage",
    "bohr",
    "boole",
    "cantor",
    "carnot",
    "cauchy",
    "celsius",
    "church",
    "codd",
    "curie",
    "dijkstra",
    "dirac",
    "euler",
    "faraday",
    "fermat",
    "fourier",
    "galois",
    "gauss",
    "germain",
    "goedel",
    "hamilton",
    "hilbert",
    "hopper",
    "huygens",
    "jacobi",
    "joule",
    "kelvin",
    "kepler",
    "knuth",
    "lagrange",
    "laplace",
    "leibniz",
    "lovelace",
    "maxwell",
    "meitner",
    "mendel",
    "neumann",
    "noether",
    "ohm",
    "pascal",
    "planck",
    "ramanujan",
    "riemann",
    "shannon",
    "turing",
    "volta",
];

/// A name such as docker gives: adjective_surname.
pub(crate) fn generate() -> String {
    let mut rng = rand::rng();
    let adjective = ADJECTIVES.choose(&mut rng).copied().unwrap_or("plain");
    let surname = SURNAMES.choose(&mut rng).copied().unwrap_or("turing");
    format!("{adjective}_{surname}")
}

/// A new id: 64 hexadecimal digits.
pub(crate) fn new_id() -> String {
    let mut rng = rand::rng();
    (0..8)
        .map(|_| format!("{:08x}", rng.random::<u32>()))
        .collect()
}

/// A few hexadecimal digits that tell two pods of one name apart.
pub(crate) fn suffix() -> String {
    format!("{:04x}", rand::rng().random::<u16>())
}

/// Checks a name that somebody chose.
pub(crate) fn check(name: &str) -> Result<()> {
    let name = name.strip_prefix('/').unwrap_or(name);
    let first = name
        .chars()
        .next()
        .is_some_and(|c| c.is_ascii_alphanumeric());
    let rest = name
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'));
    if !(first && rest && name.len() > 1) {
        return Err(Failure::daemon(format_args!(
            "Invalid container name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed"
        )));
    }
    let last = name
        .chars()
        .last()
        .is_some_and(|c| c.is_ascii_alphanumeric());
    if name.len() > 63 || !last {
        return Err(Failure::daemon(format_args!(
            "Invalid container name ({name}): it is a label of the pod and may have 63 characters, the last a letter or digit"
        )));
    }
    Ok(())
}

/// The name as Kubernetes can hold it: lower case, `-` for `_` and `.`.
pub(crate) fn of_pod(name: &str) -> String {
    let name: String = name
        .chars()
        .map(|c| match c {
            '_' | '.' => '-',
            c => c.to_ascii_lowercase(),
        })
        .take(57)
        .collect();
    name.trim_matches('-').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_names_are_valid() {
        for _ in 0..200 {
            let name = generate();
            check(&name).unwrap();
            assert!(
                of_pod(&name)
                    .chars()
                    .all(|c| c.is_ascii_lowercase() || c == '-')
            );
        }
        assert_eq!(new_id().len(), 64);
    }

    #[test]
    fn chosen_names_are_checked() {
        for good in ["web", "My_App.1", "a1"] {
            check(good).unwrap();
        }
        for bad in ["", "a", "-a", "a b", "a/b", "a-", &"x".repeat(64)] {
            assert!(check(bad).is_err(), "{bad}");
        }
        assert_eq!(
            check("no good").unwrap_err().message,
            "Error response from daemon: Invalid container name (no good), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed"
        );
    }

    #[test]
    fn pods_have_names_that_kubernetes_takes() {
        assert_eq!(of_pod("My_App.1"), "my-app-1");
        assert_eq!(of_pod("web"), "web");
    }
}
