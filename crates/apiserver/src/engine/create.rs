//! Create.

use std::sync::Arc;

use bytes::Bytes;
use http::Response;
use hypernetes_apimachinery::{Status, defaults, managed::Managers, meta, validation};
use hypernetes_store::{Compare, Op, StoreError};
use serde_json::Value;

use super::{
    Call, Engine, Written, decode, managers,
    strategy::{self, Part},
};
use crate::{
    body::ApiBody,
    certificates,
    codec::{self, Encoded},
    definitions, keys, negotiate,
    status::{self, Result},
};

/// How often a generated name may be taken.
const NAME_ATTEMPTS: usize = 8;

impl Engine {
    /// `create`.
    pub(crate) async fn create(&self, call: &Call, bytes: &Bytes) -> Result<Response<ApiBody>> {
        negotiate::view(&call.headers, &call.query)?;
        let (object, warnings) = decode::object(bytes, call)?;
        let mut written = self.create_object(call, object).await?;
        written.warnings.splice(0..0, warnings);
        self.answer(call, written)
    }

    /// Makes an object that has been decoded.
    pub(crate) async fn create_object(&self, call: &Call, object: Value) -> Result<Written> {
        self.create_managed(call, object, None).await
    }

    /// Makes an object; who manages its fields is found out, or known already.
    pub(crate) async fn create_managed(
        &self,
        call: &Call,
        object: Value,
        managers: Option<&Managers>,
    ) -> Result<Written> {
        let dry_run = call.is_dry_run()?;
        let base = match (meta::name(&object), meta::generate_name(&object)) {
            (None | Some(""), Some(base)) if !base.is_empty() => Some(base.to_owned()),
            _ => None,
        };
        let mut attempts = 0;
        loop {
            attempts += 1;
            let mut candidate = object.clone();
            if let Some(base) = &base {
                meta::set(&mut candidate, "name", meta::generate(base));
            }
            match self.try_create(call, candidate, managers, dry_run).await {
                Err(status)
                    if base.is_some()
                        && status.reason == "AlreadyExists"
                        && attempts < NAME_ATTEMPTS => {}
                result => return result,
            }
        }
    }

    async fn try_create(
        &self,
        call: &Call,
        mut object: Value,
        managers: Option<&Managers>,
        dry_run: bool,
    ) -> Result<Written> {
        let kind = strategy::stored_kind(call.kind);
        self.place(call, &mut object)?;
        if meta::resource_version(&object).is_some_and(|text| !text.is_empty()) {
            return Err(Status::bad_request(
                "resourceVersion should not be set on objects to be created",
            ));
        }
        let name = meta::name(&object).unwrap_or_default().to_owned();
        let namespace = call.info.namespace.as_str();
        strategy::prepare_create(kind, &mut object, (self.clock)());
        certificates::prepare_create(call, &mut object);
        defaults::apply(kind, &mut object);
        self.admit_account(kind, namespace, &mut object).await?;
        strategy::finish_create(kind, &mut object);
        self.complete(call, &mut object);
        if call
            .custom
            .as_ref()
            .is_some_and(|custom| custom.terminating)
        {
            let mut status = Status::method_not_allowed();
            status.message =
                "create not allowed while custom resource definition is terminating".into();
            return Err(status);
        }
        let is_definition = definitions::is_definition(kind);
        let _naming = match is_definition {
            true => Some(self.naming.lock().await),
            false => None,
        };
        if is_definition {
            self.settle_names(&mut object)?;
        }
        let mut common = managers::dedup_owners(&mut object);
        match managers {
            Some(managers) => managers.write(&mut object),
            None => self.record(call, Part::Main, None, &mut object)?,
        }
        loop {
            let home = self.open_namespace(kind, namespace, &name)?;
            let mut object = object.clone();
            let mut warnings = std::mem::take(&mut common);
            warnings.extend(self.admit_create(call, &mut object, home.as_ref())?);
            self.bind_to_node(kind, &mut object);
            let mut errors = validation::validate_create(kind, &object);
            self.validate_custom(call, &object, None, &mut errors);
            if !errors.is_empty() {
                return Err(Status::invalid(
                    call.kind.group,
                    call.kind.kind,
                    &name,
                    &errors,
                ));
            }
            self.check_escalation(call, &object, None)?;
            self.check_clone(call, &object)?;
            self.check_range(kind, &object)?;
            let allocation = self.allocate(kind, &mut object, None)?;
            let charge = self.charge(call, &object, None)?;
            let key = keys::object(kind, namespace, &name);
            if dry_run {
                if self.store.get(&key).is_some() {
                    return Err(Status::already_exists(
                        call.kind.group,
                        call.kind.plural,
                        &name,
                    ));
                }
                return Ok(Written {
                    code: 201,
                    object,
                    warnings,
                });
            }
            let encoded = Arc::new(Encoded::new(&object));
            let mut compares = vec![Compare::Absent(key.clone())];
            if let Some(home) = home {
                // The namespace has not begun to end meanwhile: nothing is left behind in it.
                compares.push(Compare::ModRevision(home.key, home.mod_revision));
            }
            let mut ops = vec![Op::Put(key.clone(), encoded.to_store_value())];
            compares.extend(allocation.compares);
            ops.extend(allocation.ops);
            compares.extend(charge.compares);
            ops.extend(charge.ops);
            match self.store.txn(compares, ops, Self::durability(kind)).await {
                Ok(revision) => {
                    let object = codec::decode(&encoded.with_revision(revision));
                    return Ok(Written {
                        code: 201,
                        object,
                        warnings,
                    });
                }
                Err(StoreError::Conflict { key: at, .. }) if at == key => {
                    return Err(Status::already_exists(
                        call.kind.group,
                        call.kind.plural,
                        &name,
                    ));
                }
                Err(StoreError::Conflict { .. }) => {}
                Err(error) => return Err(status::of_store(&error)),
            }
        }
    }

    /// Puts the object where the path says, if it does not say otherwise itself.
    fn place(&self, call: &Call, object: &mut Value) -> Result<()> {
        let given = meta::namespace(object).unwrap_or_default();
        if call.kind.namespaced {
            if given.is_empty() {
                meta::set(object, "namespace", call.info.namespace.as_str());
            } else if given != call.info.namespace {
                return Err(Status::bad_request(
                    "the namespace of the provided object does not match the namespace sent on \
                     the request",
                ));
            }
        } else if !given.is_empty() {
            meta::remove(object, "namespace");
        }
        Ok(())
    }
}
