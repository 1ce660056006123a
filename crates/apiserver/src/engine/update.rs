//! Update and patch, of objects and of their status.

use std::sync::Arc;

use bytes::Bytes;
use http::{Response, header};
use hypernetes_apimachinery::{
    Status, defaults,
    managed::Managers,
    meta,
    patch::{self, PatchType},
    strict::{self, FieldValidation, Parsed},
    validation::{self, FieldError},
};
use hypernetes_store::{Compare, Entry, Op};
use serde_json::Value;

use super::{
    Call, Engine, Written,
    bounds::Charge,
    conflict_of, decode, managers, modified, revision_of,
    strategy::{self, Part},
};
use crate::{
    body::ApiBody,
    codec::{self, Encoded},
    definitions, keys, negotiate,
    services::Allocation,
    status::{self, Result},
};

/// How often a patch is tried anew on an object that changes meanwhile.
const ATTEMPTS: usize = 100;
/// How many operations a JSON patch may have (upstream's limit).
const OPERATIONS: usize = 10_000;

const PATCH_TYPES: [&str; 4] = [
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
    "application/apply-patch+yaml",
];

impl Engine {
    /// `update`.
    pub(crate) async fn update(
        &self,
        call: &Call,
        part: Part,
        bytes: &Bytes,
    ) -> Result<Response<ApiBody>> {
        negotiate::view(&call.headers, &call.query)?;
        let (object, warnings) = decode::object(bytes, call)?;
        managers::check_options(call, "UpdateOptions")?;
        let dry_run = call.is_dry_run()?;
        let conditional = revision_of(&object)?.is_some();
        for _ in 0..ATTEMPTS {
            let Some(entry) = self.store.get(&call.key()) else {
                if part == Part::Main && strategy::creates_on_update(call.kind) && !conditional {
                    self.check_name(call, &object)?;
                    self.check_may_create(call)?;
                    let written = self.create_object(call, object).await?;
                    return self.answer(call, written);
                }
                return Err(call.not_found());
            };
            let done = self
                .replace(call, part, &entry, object.clone(), dry_run)
                .await?;
            if let Some(mut written) = done {
                written.warnings.splice(0..0, warnings);
                return self.answer(call, written);
            }
            if conditional {
                return Err(modified(call.kind, &call.info.name));
            }
        }
        Err(modified(call.kind, &call.info.name))
    }

    /// `patch`.
    pub(crate) async fn patch(
        &self,
        call: &Call,
        part: Part,
        bytes: &Bytes,
    ) -> Result<Response<ApiBody>> {
        negotiate::view(&call.headers, &call.query)?;
        let content_type = call
            .headers
            .get(header::CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        let patch_type = PatchType::from_content_type(content_type)
            .ok_or_else(|| Status::unsupported_media_type(&PATCH_TYPES))?;
        if patch_type == PatchType::Apply {
            return self.apply(call, part, bytes).await;
        }
        managers::check_options(call, "PatchOptions")?;
        if call.query.text("force").is_some() {
            return Err(managers::invalid_option(
                "PatchOptions",
                FieldError::forbidden("force", "may not be specified for non-apply patch"),
            ));
        }
        let mode = decode::field_validation(&call.query)?;
        let dry_run = call.is_dry_run()?;
        let parsed = strict::parse_json(bytes)
            .map_err(|error| status::of_decode(&error, call.kind.kind, &call.kind.api_version()))?;
        if let Value::Array(operations) = &parsed.value
            && operations.len() > OPERATIONS
        {
            return Err(Status::failure(
                413,
                "RequestEntityTooLarge",
                format!(
                    "The allowed maximum operations in a JSON patch is {OPERATIONS}, got {}",
                    operations.len()
                ),
            ));
        }
        for _ in 0..ATTEMPTS {
            let entry = self
                .store
                .get(&call.key())
                .ok_or_else(|| call.not_found())?;
            let (object, warnings) = self.patched(call, &entry, patch_type, &parsed, mode)?;
            if let Some(mut written) = self.replace(call, part, &entry, object, dry_run).await? {
                written.warnings.splice(0..0, warnings);
                return self.answer(call, written);
            }
        }
        Err(modified(call.kind, &call.info.name))
    }

    /// The stored object with the patch applied, in stored form.
    fn patched(
        &self,
        call: &Call,
        entry: &Entry,
        patch_type: PatchType,
        parsed: &Parsed,
        mode: FieldValidation,
    ) -> Result<(Value, Vec<String>)> {
        let old = Self::present(call.kind, codec::decode(&entry.value));
        let schema = call.schema()?;
        let failed = |error| status::of_patch(&error, call.kind, &call.info.name);
        if patch_type == PatchType::StrategicMerge && call.custom.is_some() {
            return Err(Status::unsupported_media_type(&[
                PATCH_TYPES[0],
                PATCH_TYPES[1],
                PATCH_TYPES[3],
            ]));
        }
        let value = match patch_type {
            PatchType::Json => patch::json_patch(&old, &parsed.value).map_err(failed)?,
            PatchType::Merge => patch::merge_patch(&old, &parsed.value),
            _ => patch::strategic_merge_patch(&old, &parsed.value, schema).map_err(failed)?,
        };
        let parsed = Parsed {
            value,
            duplicates: parsed.duplicates.clone(),
        };
        let (object, warnings) = decode::reviewed_for(call, parsed, mode)?;
        Ok((decode::stored(call.kind, object), warnings))
    }

    pub(super) fn check_name(&self, call: &Call, object: &Value) -> Result<()> {
        let name = meta::name(object).unwrap_or_default();
        if name == call.info.name {
            return Ok(());
        }
        if name.is_empty() {
            return Err(Status::bad_request("name must be provided"));
        }
        Err(Status::bad_request(format!(
            "the name of the object ({name}) does not match the name on the URL ({})",
            call.info.name
        )))
    }

    /// Writes a new version of a stored object. `None`: it has changed meanwhile.
    pub(crate) async fn replace(
        &self,
        call: &Call,
        part: Part,
        entry: &Entry,
        new: Value,
        dry_run: bool,
    ) -> Result<Option<Written>> {
        self.replace_managed(call, part, entry, new, None, dry_run)
            .await
    }

    /// Writes a new version; who manages its fields is found out, or known already.
    pub(crate) async fn replace_managed(
        &self,
        call: &Call,
        part: Part,
        entry: &Entry,
        mut new: Value,
        managers: Option<&Managers>,
        dry_run: bool,
    ) -> Result<Option<Written>> {
        let kind = strategy::stored_kind(call.kind);
        let old = codec::decode(&entry.value);
        self.check_name(call, &new)?;
        if kind.namespaced {
            match meta::namespace(&new) {
                Some(given) if !given.is_empty() && given != call.info.namespace => {
                    return Err(Status::bad_request(
                        "the namespace of the provided object does not match the namespace sent \
                         on the request",
                    ));
                }
                _ => meta::set(&mut new, "namespace", call.info.namespace.as_str()),
            }
        }
        if revision_of(&new)?.is_some_and(|revision| revision != entry.mod_revision) {
            return Err(modified(call.kind, &call.info.name));
        }
        check_uid(call, meta::uid(&new), &old)?;
        match part {
            Part::Approval => self.check_signer(call, &old, "approve")?,
            Part::Status => self.check_signer(call, &old, "sign")?,
            _ => {}
        }
        strategy::prepare_update(kind, part, &mut new, &old, (self.clock)());
        if matches!(part, Part::Main | Part::Ephemeral | Part::Resize) {
            defaults::apply(kind, &mut new);
        }
        self.complete(call, &mut new);
        let _naming = match definitions::is_definition(kind) {
            true => Some(self.naming.lock().await),
            false => None,
        };
        if definitions::is_definition(kind) {
            self.settle_names(&mut new)?;
        }
        meta::set_resource_version(&mut new, entry.mod_revision);
        let mut warnings = managers::dedup_owners(&mut new);
        match managers {
            Some(managers) => managers.write(&mut new),
            None => self.record(call, part, Some(&old), &mut new)?,
        }
        if new == old {
            return Ok(Some(Written {
                code: 200,
                object: old,
                warnings,
            }));
        }
        if matches!(part, Part::Main | Part::Ephemeral | Part::Resize) {
            warnings.extend(self.admit_update(call, &mut new, &old)?);
        }
        let mut errors = match part {
            Part::Main => validation::validate_update(kind, &new, &old),
            Part::Ephemeral => validation::validate_ephemeral_update(kind, &new, &old),
            Part::Resize => validation::validate_resize(kind, &new, &old),
            Part::Status | Part::Approval | Part::Finalize => {
                validation::validate_status_update(kind, &new, &old)
            }
        };
        self.validate_custom(call, &new, Some(&old), &mut errors);
        if !errors.is_empty() {
            return Err(Status::invalid(
                call.kind.group,
                call.kind.kind,
                &call.info.name,
                &errors,
            ));
        }
        self.check_escalation(call, &new, Some(&old))?;
        let allocation = match part {
            Part::Main => self.allocate(kind, &mut new, Some(&old))?,
            _ => Allocation::default(),
        };
        let charge = match part {
            Part::Status | Part::Approval | Part::Finalize => Charge::default(),
            _ => self.charge(call, &new, Some(&old))?,
        };
        if dry_run {
            return Ok(Some(Written {
                code: 200,
                object: new,
                warnings,
            }));
        }
        let key = keys::object(kind, &call.info.namespace, &call.info.name);
        let encoded = Arc::new(Encoded::new(&new));
        let mut compares = vec![Compare::ModRevision(key.clone(), entry.mod_revision)];
        let mut ops;
        if strategy::is_finished(kind, &new) {
            ops = vec![Op::Delete(key)];
            ops.extend(self.release(kind, &old));
        } else {
            ops = vec![Op::Put(key, encoded.to_store_value())];
            compares.extend(allocation.compares);
            ops.extend(allocation.ops);
            compares.extend(charge.compares);
            ops.extend(charge.ops);
        }
        match self.store.txn(compares, ops, Self::durability(kind)).await {
            Ok(revision) => {
                let object = codec::decode(&encoded.with_revision(revision));
                Ok(Some(Written {
                    code: 200,
                    object,
                    warnings,
                }))
            }
            Err(error) => conflict_of(error).map(|_current| None),
        }
    }
}

impl Engine {
    /// Brings an object into the form in which it is stored: for a custom resource with its defaults, in the
    /// stored version.
    pub(super) fn complete(&self, call: &Call, object: &mut Value) {
        meta::drop_empty(object);
        if let Some(custom) = &call.custom {
            custom.complete(object);
            object["apiVersion"] = custom.stored_as.as_str().into();
        }
    }

    /// Checks a custom resource against its definition.
    pub(super) fn validate_custom(
        &self,
        call: &Call,
        new: &Value,
        old: Option<&Value>,
        errors: &mut Vec<FieldError>,
    ) {
        let Some(custom) = &call.custom else { return };
        // Our own kinds are checked beside: what is found there need not be said twice.
        let ours = call.kind.group == hypernetes_types::kinds::GROUP;
        if !ours || errors.is_empty() {
            errors.extend(custom.validate(new, old));
        }
    }

    /// Writes an object, or removes it if nothing holds it any more. `false`: it has changed
    /// meanwhile.
    pub(crate) async fn put_or_remove(
        &self,
        call: &Call,
        entry: &Entry,
        object: &Value,
    ) -> Result<bool> {
        if !strategy::is_finished(call.kind, object) {
            return self.overwrite(call, entry, object, false).await;
        }
        let op = Op::Delete(entry.key.clone());
        let compares = vec![Compare::ModRevision(entry.key.clone(), entry.mod_revision)];
        match self
            .store
            .txn(compares, vec![op], Self::durability(call.kind))
            .await
        {
            Ok(_) => Ok(true),
            Err(error) => conflict_of(error).map(|_current| false),
        }
    }

    /// Writes an object that a subresource has changed. `false`: it has changed meanwhile.
    pub(crate) async fn overwrite(
        &self,
        call: &Call,
        entry: &Entry,
        object: &Value,
        dry_run: bool,
    ) -> Result<bool> {
        if dry_run {
            return Ok(true);
        }
        let op = Op::Put(
            entry.key.clone(),
            Arc::new(Encoded::new(object)).to_store_value(),
        );
        let compares = vec![Compare::ModRevision(entry.key.clone(), entry.mod_revision)];
        match self
            .store
            .txn(compares, vec![op], Self::durability(call.kind))
            .await
        {
            Ok(_) => Ok(true),
            Err(error) => conflict_of(error).map(|_current| false),
        }
    }
}

/// Refuses a write that means another object of the same name.
fn check_uid(call: &Call, given: Option<&str>, old: &Value) -> Result<()> {
    let current = meta::uid(old).unwrap_or_default();
    match given {
        Some(given) if !given.is_empty() && given != current => Err(Status::conflict(
            call.kind.group,
            call.kind.plural,
            &call.info.name,
            &format!(
                "Precondition failed: UID in precondition: {given}, UID in object meta: {current}"
            ),
        )),
        _ => Ok(()),
    }
}
