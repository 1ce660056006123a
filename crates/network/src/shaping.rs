//! Limits of a pod's traffic on a network of this node.
//!
//! ```text
//!  to the pod      routed ──▶ tap's own queue (tbf) ══▶ VMM
//!  from the pod    VMM ══▶ tap ── tc redirect ──▶ ifb's queue (tbf) ──▶ as if from the tap, routed
//! ```
//! What comes back from an ifb passes no rules of the tap any more: so only what they would let
//! through goes that way. Everything else stays on the tap, where the rules are.

use std::io;

use crate::{
    links::Links,
    plan::{Bucket, PodPlan},
    tc::{self, Ethertype},
};

/// Sets the limits of a pod's tap, which must be there. Repeatable. The tap takes the one of what the
/// pod receives with it when it goes; [`PodPlan::outlet`] is to be deleted.
pub(crate) async fn apply(links: &Links, pod: &PodPlan) -> io::Result<()> {
    if let Some(bps) = pod.bandwidth.ingress_bps {
        let tap = links.existing(&pod.device).await?;
        links.limit(tap, Bucket::new(bps)).await?;
    }
    if let Some(bps) = pod.bandwidth.egress_bps {
        limit_egress(links, pod, Bucket::new(bps)).await?;
    }
    Ok(())
}

async fn limit_egress(links: &Links, pod: &PodPlan, bucket: Bucket) -> io::Result<()> {
    let outlet = pod.outlet();
    links.ensure_ifb(&outlet).await?;
    links.set_mtu(&outlet, pod.mtu).await?;
    let (tap, ifb) = (
        links.existing(&pod.device).await?,
        links.existing(&outlet).await?,
    );
    links.limit(ifb, bucket).await?;
    links.set_up(&outlet).await?;
    links.renew_ingress(tap).await?;
    let mut own = tc::from_mac(pod.mac).to_vec();
    own.push(tc::from_v4(pod.address));
    links.redirect(tap, ifb, 1, Ethertype::V4, own).await
}
