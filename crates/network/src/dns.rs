//! Name resolution of one network: a server on the gateway's address, inside the namespace.
//!
//! It knows the names of its own network and nothing of others'. What is not below the network's
//! domain goes to the node's upstream servers from the node's own namespace, if the network has
//! egress. Pods are hostile: queries are bounded in size, rate and number at a time.

mod bucket;
mod forward;
mod server;
mod zone;

pub(crate) use server::DnsServer;
pub(crate) use zone::Zone;
