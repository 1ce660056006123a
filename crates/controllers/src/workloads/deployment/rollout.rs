//! How many replicas each set of a deployment has next.

use serde_json::Value;

use super::{Sets, replicas, resize, room};
use crate::{
    error::ReconcileError,
    workloads::{cluster::Cluster, owned::number},
};

/// With how many replicas the set of the present template goes on: as many more as there is room
/// for.
pub(super) fn replicas_of_new(deployment: &Value, sets: &Sets) -> i64 {
    let wanted = replicas(deployment);
    let now = sets.new.as_ref().map_or(0, replicas);
    let total: i64 = sets.all().map(replicas).sum();
    let most = wanted + room(deployment).0;
    if total >= most {
        return now.min(wanted);
    }
    if now >= wanted {
        return wanted;
    }
    now + (most - total).min(wanted - now)
}

/// One step of a rolling update: up with the new, or down with the old.
pub(super) async fn roll(
    cluster: &Cluster,
    deployment: &Value,
    sets: &mut Sets,
) -> Result<(), ReconcileError> {
    let to = replicas_of_new(deployment, sets);
    if let Some(new) = &sets.new
        && replicas(new) != to
    {
        sets.new = Some(resize(cluster, deployment, new, to).await?);
        return Ok(());
    }
    let sizes = shrink(deployment, sets);
    for (set, to) in sets.old.iter_mut().zip(sizes) {
        if replicas(set) != to {
            *set = resize(cluster, deployment, set, to).await?;
        }
    }
    Ok(())
}

/// New sizes of the old sets: what does not serve goes first, then as much as may be missing.
fn shrink(deployment: &Value, sets: &Sets) -> Vec<i64> {
    let mut sizes: Vec<i64> = sets.old.iter().map(replicas).collect();
    let available = |set: &Value| number(&set["status"]["availableReplicas"]);
    let least = replicas(deployment) - room(deployment).1;
    let new = sets.new.as_ref();
    let new_unavailable = new.map_or(0, |set| replicas(set) - available(set)).max(0);
    let total: i64 = sets.all().map(replicas).sum();
    let mut most = total - least - new_unavailable;
    for (size, set) in sizes.iter_mut().zip(&sets.old) {
        if most <= 0 {
            return sizes;
        }
        let broken = (*size - available(set)).max(0).min(most);
        *size -= broken;
        most -= broken;
    }
    // What is left serves: no more of it goes than is there beyond the least.
    let serving: i64 = sets.all().map(available).sum();
    let mut most = serving - least;
    for size in &mut sizes {
        if most <= 0 {
            break;
        }
        let gone = (*size).min(most);
        *size -= gone;
        most -= gone;
    }
    sizes
}

/// A change of the number alone, while the roll-out stands still: in proportion.
pub(super) async fn scale(
    cluster: &Cluster,
    deployment: &Value,
    sets: &mut Sets,
) -> Result<(), ReconcileError> {
    let sizes: Vec<i64> = sets.all().map(replicas).collect();
    let running = sizes.iter().filter(|size| **size > 0).count();
    let wanted = replicas(deployment);
    let targets = match (running, sizes.as_slice()) {
        (_, []) => return Ok(()),
        // The newest that there is.
        (0, _) => {
            let mut targets = vec![0; sizes.len()];
            let at = if sets.new.is_some() {
                0
            } else {
                sizes.len() - 1
            };
            targets[at] = wanted;
            targets
        }
        (1, _) => sizes
            .iter()
            .map(|size| if *size > 0 { wanted } else { 0 })
            .collect(),
        _ => {
            let surge = if wanted > 0 { room(deployment).0 } else { 0 };
            let total: i64 = sizes.iter().sum();
            // A roll-out under way may have its surge: only another number is a reason to act.
            let before = sets.all().find_map(|set| {
                hypernetes_apimachinery::meta::annotation(set, super::DESIRED)?
                    .parse()
                    .ok()
            });
            if before == Some(wanted) {
                return Ok(());
            }
            proportional(&sizes, (wanted + surge).min(total.max(wanted)))
        }
    };
    let mut targets = targets.into_iter();
    if let Some(new) = &mut sets.new
        && let Some(to) = targets.next()
    {
        *new = resize(cluster, deployment, new, to).await?;
    }
    for (set, to) in sets.old.iter_mut().zip(targets) {
        if replicas(set) != to || to > 0 {
            *set = resize(cluster, deployment, set, to).await?;
        }
    }
    Ok(())
}

/// Sizes with that sum, each in proportion to what it was; what is left over goes to the largest.
fn proportional(sizes: &[i64], sum: i64) -> Vec<i64> {
    let total: i64 = sizes.iter().sum();
    if total == 0 {
        return sizes.to_vec();
    }
    let mut out: Vec<i64> = sizes.iter().map(|size| size * sum / total).collect();
    let rest = sum - out.iter().sum::<i64>();
    if let Some(largest) = (0..sizes.len()).max_by_key(|at| sizes[*at]) {
        out[largest] += rest;
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn set(replicas: i64, available: i64) -> Value {
        json!({"spec": {"replicas": replicas}, "status": {"availableReplicas": available}})
    }

    fn deployment(replicas: i64, surge: &Value, unavailable: &Value) -> Value {
        json!({"spec": {"replicas": replicas, "strategy": {"type": "RollingUpdate",
            "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}}}})
    }

    #[test]
    fn the_new_set_grows_into_the_room_that_there_is() {
        let ten = deployment(10, &json!(3), &json!(2));
        for (new, old, expected) in [
            (0, 10, 3),
            (3, 10, 3),
            (3, 5, 8),
            (8, 5, 8),
            (8, 2, 10),
            (12, 0, 10),
        ] {
            let sets = Sets {
                new: Some(set(new, 0)),
                old: vec![set(old, old)],
            };
            assert_eq!(replicas_of_new(&ten, &sets), expected, "{new} {old}");
        }
    }

    #[test]
    fn old_sets_shrink_no_further_than_may_be_missing() {
        let ten = deployment(10, &json!(3), &json!(2));
        let cases = [
            // (new, available of it), old ones, sizes
            ((3, 0), vec![(10, 10)], vec![8]),
            ((3, 3), vec![(10, 10)], vec![5]),
            ((3, 0), vec![(8, 8)], vec![8]),
            ((10, 10), vec![(3, 3)], vec![0]),
            // What does not serve goes first, whichever set it is of.
            ((3, 3), vec![(4, 4), (6, 0)], vec![4, 1]),
        ];
        for ((size, available), old, expected) in cases {
            let old_sets = old
                .iter()
                .map(|(size, available)| set(*size, *available))
                .collect();
            let sets = Sets {
                new: Some(set(size, available)),
                old: old_sets,
            };
            assert_eq!(shrink(&ten, &sets), expected, "{size} {available} {old:?}");
        }
    }

    #[test]
    fn percentages_of_little_still_go_on() {
        let one = deployment(1, &json!("0%"), &json!("25%"));
        assert_eq!(super::super::room(&one), (0, 1));
        assert_eq!(
            super::super::room(&deployment(4, &json!("25%"), &json!("25%"))),
            (1, 1)
        );
    }

    #[test]
    fn proportions_are_kept() {
        assert_eq!(proportional(&[5, 5], 20), [10, 10]);
        assert_eq!(proportional(&[2, 8], 5), [1, 4]);
        assert_eq!(proportional(&[1, 2], 10).iter().sum::<i64>(), 10);
    }
}
