//! Keeps [`Policy`] up to date with the store and asks it.

use std::sync::{Mutex, PoisonError};

use hypernetes_apimachinery::Status;
use hypernetes_identity::User;
use hypernetes_store::{Store, StoreError, Watch};

use crate::{
    codec, keys,
    rbac::{Action, Policy, PolicyKind, RoleRef, Rule},
    status::{self, Result},
};

const SOURCES: [(&str, PolicyKind); 4] = [
    ("roles", PolicyKind::Role),
    ("clusterroles", PolicyKind::Role),
    ("rolebindings", PolicyKind::Binding),
    ("clusterrolebindings", PolicyKind::Binding),
];

/// Decides who may do what. Every decision sees all writes that were acknowledged before it.
#[derive(Debug)]
pub(crate) struct Authorizer {
    store: Store,
    state: Mutex<Option<State>>,
}

#[derive(Debug)]
struct State {
    policy: Policy,
    watches: Vec<(PolicyKind, Watch)>,
}

impl Authorizer {
    pub(crate) fn new(store: Store) -> Self {
        Self {
            store,
            state: Mutex::new(None),
        }
    }

    /// Refuses, in upstream's words, what the user may not do.
    pub(crate) fn check(&self, user: &User, action: &Action<'_>) -> Result<()> {
        if self.allows(user, action)? {
            Ok(())
        } else {
            Err(action.refusal(user))
        }
    }

    /// Whether the user may do it.
    pub(crate) fn allows(&self, user: &User, action: &Action<'_>) -> Result<bool> {
        self.with(|policy| policy.allows(user, action))
    }

    /// The rules that hold for the user in the namespace.
    pub(crate) fn rules_of(&self, user: &User, namespace: &str) -> Result<Vec<Rule>> {
        self.with(|policy| policy.rules_of(user, namespace))
    }

    /// What of `wanted` the user does not hold.
    pub(crate) fn missing(
        &self,
        user: &User,
        namespace: &str,
        wanted: &[Rule],
    ) -> Result<Vec<Rule>> {
        self.with(|policy| {
            policy
                .missing(user, namespace, wanted)
                .into_iter()
                .cloned()
                .collect()
        })
    }

    /// The rules of a role that a binding in `namespace` refers to.
    pub(crate) fn rules_of_role(
        &self,
        role: &RoleRef,
        namespace: &str,
    ) -> Result<Option<Vec<Rule>>> {
        self.with(|policy| policy.rules_of_role(role, namespace).cloned())
    }

    fn with<T>(&self, ask: impl FnOnce(&Policy) -> T) -> Result<T> {
        // A panic while the policy changes could leave it half done: it is then read anew.
        let mut guard = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let state = match guard.take() {
            Some(mut state) => match state.catch_up() {
                Ok(()) => state,
                Err(StoreError::Lagged { .. }) => self.read().map_err(|e| status::of_store(&e))?,
                Err(error) => return Err(status::of_store(&error)),
            },
            None => self.read().map_err(|e| status::of_store(&e))?,
        };
        let answer = ask(&state.policy);
        *guard = Some(state);
        Ok(answer)
    }

    fn read(&self) -> std::result::Result<State, StoreError> {
        let mut state = State {
            policy: Policy::default(),
            watches: Vec::new(),
        };
        for (storage, kind) in SOURCES {
            let prefix = format!("{}{storage}/", keys::ROOT);
            // The watch begins before the list: what happens between is seen twice, not missed.
            state.watches.push((kind, self.store.watch(&prefix, None)?));
            for entry in self.store.list(&prefix, None, None, None)?.entries {
                state
                    .policy
                    .set(kind, &entry.key, Some(&codec::decode(&entry.value)));
            }
        }
        state.catch_up()?;
        Ok(state)
    }
}

impl State {
    fn catch_up(&mut self) -> std::result::Result<(), StoreError> {
        for (kind, watch) in &mut self.watches {
            while let Some(change) = watch.try_next()? {
                let object = change.value.as_deref().map(codec::decode);
                self.policy.set(*kind, &change.key, object.as_ref());
            }
        }
        Ok(())
    }
}

/// The refusal of handing out more than one holds.
pub(crate) fn escalation(
    user: &User,
    group: &str,
    resource: &str,
    name: &str,
    missing: &[Rule],
) -> Status {
    let rules: Vec<String> = missing.iter().map(crate::rbac::describe).collect();
    let why = format!(
        "user {:?} (groups={:?}) is attempting to grant RBAC permissions not currently held:\n{}",
        user.name,
        user.groups,
        rules.join("\n")
    );
    Status::forbidden(group, resource, name, &why)
}
