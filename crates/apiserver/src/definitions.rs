//! What becomes of CustomResourceDefinitions: which of their names are accepted, and their objects
//! when they go.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use http::HeaderMap;
use hypernetes_apimachinery::{
    ResourceKind, Status,
    crd::{CustomKind, names},
    kinds, meta,
};
use hypernetes_identity::User;
use hypernetes_store::{Store, StoreError};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::{
    codec,
    engine::{Call, DeleteOptions, Engine},
    keys,
    query::Query,
    request_info::RequestInfo,
    server::Inner,
    status::{self, Result},
};

const GROUP: &str = "apiextensions.k8s.io";
const PLURAL: &str = "customresourcedefinitions";
/// How often what could not be done is tried again.
const PAUSE: Duration = Duration::from_secs(1);

/// Whether the kind is that of definitions.
pub(crate) fn is_definition(kind: &ResourceKind) -> bool {
    kind.group == GROUP && kind.plural == PLURAL
}

fn kind() -> Result<&'static ResourceKind> {
    kinds::by_resource(GROUP, "v1", PLURAL)
        .ok_or_else(|| Status::internal("definitions are not served"))
}

impl Engine {
    /// All definitions.
    fn definitions(&self) -> Result<Vec<Value>> {
        let prefix = keys::prefix(kind()?, "");
        let page = self.store.list(&prefix, None, None, None);
        let page = page.map_err(|error| status::of_store(&error))?;
        Ok(page
            .entries
            .iter()
            .map(|entry| codec::decode(&entry.value))
            .collect())
    }

    /// Sets what follows from the names of a definition. The caller holds [`Engine::naming`], so that
    /// of two definitions made at once one sees the other.
    pub(crate) fn settle_names(&self, definition: &mut Value) -> Result<()> {
        let now = meta::format_time((self.clock)());
        names::settle(definition, &self.definitions()?, &now);
        Ok(())
    }

    /// Marks a definition that begins to be deleted.
    pub(crate) fn end_definition(&self, definition: &mut Value) {
        meta::add_finalizer(definition, names::CLEANUP);
        names::set_condition(
            definition,
            "Terminating",
            true,
            "InstanceDeletionPending",
            "CustomResourceDefinition marked for deletion; CustomResource deletion will begin soon",
            &meta::format_time((self.clock)()),
        );
    }

    fn call(kind: &'static ResourceKind, custom: Option<Arc<CustomKind>>, name: &str) -> Call {
        Call {
            kind,
            custom,
            info: RequestInfo {
                verb: "update",
                is_resource: true,
                group: kind.group.into(),
                version: kind.version.into(),
                resource: kind.plural.into(),
                name: name.into(),
                ..RequestInfo::default()
            },
            query: Query::default(),
            headers: HeaderMap::new(),
            user: User::system("system:apiserver"),
        }
    }

    /// Deletes the objects of definitions that go, and looks again at names that were not free.
    /// Returns whether something is left to be done.
    async fn tidy_definitions(&self) -> Result<bool> {
        let mut left = false;
        for definition in self.definitions()? {
            let name = meta::name(&definition).unwrap_or_default().to_owned();
            if meta::is_deleting(&definition) {
                if meta::finalizers(&definition).any(|f| f == names::CLEANUP) {
                    left |= !self.clean_up(&name, &definition).await?;
                }
            } else if !names::is_true(&definition, "NamesAccepted") {
                self.settle_again(&name).await?;
            }
        }
        Ok(left)
    }

    async fn settle_again(&self, name: &str) -> Result<()> {
        let _naming = self.naming.lock().await;
        let (entry, definition) = self.find(kind()?, "", name)?;
        let mut settled = definition.clone();
        self.settle_names(&mut settled)?;
        if settled != definition {
            let call = Self::call(kind()?, None, name);
            self.overwrite(&call, &entry, &settled, false).await?;
        }
        Ok(())
    }

    /// Deletes the objects of a definition; when none is left, lets go of the definition.
    async fn clean_up(&self, name: &str, definition: &Value) -> Result<bool> {
        let custom = CustomKind::of_definition(definition).into_iter().next();
        if let Some(custom) = custom {
            let prefix = keys::prefix(custom.kind, "");
            let page = self.store.list(&prefix, None, None, None);
            let page = page.map_err(|error| status::of_store(&error))?;
            for entry in &page.entries {
                let object = codec::decode(&entry.value);
                if meta::is_deleting(&object) {
                    continue;
                }
                let mut call = Self::call(
                    custom.kind,
                    Some(Arc::clone(&custom)),
                    keys::name_of(&entry.key),
                );
                call.info.verb = "delete";
                let namespace = meta::namespace(&object).unwrap_or_default();
                namespace.clone_into(&mut call.info.namespace);
                let options = DeleteOptions::default();
                let deleted = self
                    .delete_object(&call, namespace, &call.info.name, &options)
                    .await;
                match deleted {
                    Err(status) if status.reason != "NotFound" => return Err(status),
                    _ => {}
                }
            }
            let page = self.store.list(&prefix, None, None, Some(1));
            if !page
                .map_err(|error| status::of_store(&error))?
                .entries
                .is_empty()
            {
                return Ok(false);
            }
        }
        let call = Self::call(kind()?, None, name);
        let (entry, mut definition) = self.find(kind()?, "", name)?;
        meta::remove_finalizer(&mut definition, names::CLEANUP);
        names::set_condition(
            &mut definition,
            "Terminating",
            false,
            "InstanceDeletionCompleted",
            "removed all instances",
            &meta::format_time((self.clock)()),
        );
        self.put_or_remove(&call, &entry, &definition).await
    }
}

/// Runs until shutdown.
pub(crate) async fn run(inner: Weak<Inner>, store: Store, shutdown: CancellationToken) {
    let prefix = format!("{}{PLURAL}/", keys::ROOT);
    let mut watch = store.watch(&prefix, None);
    loop {
        let left = match inner.upgrade() {
            None => return,
            Some(inner) => match inner.engine.tidy_definitions().await {
                Ok(left) => left,
                Err(status) => {
                    tracing::warn!(error = %status.message, "a definition's objects stay for now");
                    true
                }
            },
        };
        let changed = async {
            match &mut watch {
                Ok(watch) => watch.next().await.map(|_| ()),
                Err(_) => {
                    tokio::time::sleep(PAUSE).await;
                    Err(StoreError::Closed)
                }
            }
        };
        let again = tokio::select! {
            () = shutdown.cancelled() => return,
            changed = changed => changed.is_err(),
            () = tokio::time::sleep(PAUSE), if left => false,
        };
        if again {
            watch = store.watch(&prefix, None);
        }
    }
}
