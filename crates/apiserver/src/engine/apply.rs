//! Server-side apply.

use bytes::Bytes;
use http::Response;
use hypernetes_apimachinery::{
    Status,
    managed::{self, ApplyError, Writer},
    meta, strict,
    validation::{ErrorKind, FieldError},
};
use serde_json::Value;

use super::{
    Call, Engine, Written,
    decode::{self, Expected},
    managers, modified,
    strategy::Part,
};
use crate::{
    body::ApiBody,
    codec,
    status::{self, Result},
};

const ATTEMPTS: usize = 100;
const OPTIONS: &str = "PatchOptions";

impl Engine {
    /// `patch` with a configuration.
    pub(super) async fn apply(
        &self,
        call: &Call,
        part: Part,
        bytes: &Bytes,
    ) -> Result<Response<ApiBody>> {
        let mode = decode::field_validation(&call.query)?;
        let parsed = strict::parse_yaml(bytes)
            .map_err(|error| Status::bad_request(format!("error decoding YAML: {error}")))?;
        let expected = Expected::of(call.kind);
        if let Some(given) = meta::api_version(&parsed.value)
            && given != expected.api_version()
        {
            return Err(Status::bad_request(format!(
                "Incorrect version specified in apply patch. Specified patch version: {given}, \
                 expected: {}",
                expected.api_version()
            )));
        }
        let (config, warnings) = decode::reviewed_for(call, parsed, mode)?;
        let config = decode::stored(call.kind, config);
        let mut written = self.apply_config(call, part, &config).await?;
        written.warnings.splice(0..0, warnings);
        self.answer(call, written)
    }

    /// Applies a configuration that has been decoded.
    pub(crate) async fn apply_config(
        &self,
        call: &Call,
        part: Part,
        config: &Value,
    ) -> Result<Written> {
        if call.query.text("fieldManager").is_none() {
            let error = FieldError {
                kind: ErrorKind::Required,
                field: "fieldManager".into(),
                value: Value::Null,
                detail: "is required for apply patch".into(),
            };
            return Err(managers::invalid_option(OPTIONS, error));
        }
        managers::check_options(call, OPTIONS)?;
        let dry_run = call.is_dry_run()?;
        if !config["metadata"]["managedFields"].is_null() {
            return Err(Status::bad_request("metadata.managedFields must be nil"));
        }
        let mut config = config.clone();
        if meta::name(&config).is_none() {
            meta::set(&mut config, "name", call.info.name.as_str());
        }
        self.check_name(call, &config)?;
        for _ in 0..ATTEMPTS {
            if let Some(written) = self.try_apply(call, part, &config, dry_run).await? {
                return Ok(written);
            }
        }
        Err(modified(call.kind, &call.info.name))
    }

    /// One attempt. `None`: the object has changed meanwhile.
    async fn try_apply(
        &self,
        call: &Call,
        part: Part,
        config: &Value,
        dry_run: bool,
    ) -> Result<Option<Written>> {
        let entry = self.store.get(&call.key());
        let live = entry.as_ref().map(|entry| codec::decode(&entry.value));
        let (api_version, time) = (
            self.managed_version(call),
            meta::format_time((self.clock)()),
        );
        let name = managers::manager_of(call);
        let writer = Writer {
            manager: &name,
            api_version: &api_version,
            subresource: managers::subresource_of(call, part),
            time: &time,
            ignored: managers::ignored(call, part),
        };
        let force = call.query.flag("force");
        let schema = call.stored_schema()?;
        let mut applied = managed::apply(schema, live.as_ref(), config, &writer, force)
            .map_err(|error| refusal(call, &error))?;
        if part == Part::Main
            && let Some(text) = managed::last_applied(live.as_ref(), config, &name)
        {
            meta::set_annotation(
                &mut applied.object,
                "kubectl.kubernetes.io/last-applied-configuration",
                &text,
            );
        }
        let Some(entry) = entry else {
            if part != Part::Main || !call.info.subresource.is_empty() {
                return Err(call.not_found());
            }
            if let Some(uid) = meta::uid(config) {
                let why = format!(
                    "uid mismatch: the provided object specified uid {uid}, and no existing \
                     object was found"
                );
                return Err(Status::conflict(
                    call.kind.group,
                    call.kind.plural,
                    &call.info.name,
                    &why,
                ));
            }
            self.check_may_create(call)?;
            let made = self
                .create_managed(call, applied.object, Some(&applied.managers))
                .await;
            return match made {
                Ok(written) => Ok(Some(written)),
                // Somebody was faster: it is a change now.
                Err(status) if status.reason == "AlreadyExists" => Ok(None),
                Err(status) => Err(status),
            };
        };
        let written = self
            .replace_managed(
                call,
                part,
                &entry,
                applied.object,
                Some(&applied.managers),
                dry_run,
            )
            .await?;
        Ok(written)
    }
}

fn refusal(call: &Call, error: &ApplyError) -> Status {
    match error {
        ApplyError::Conflicts(conflicts) => {
            let mut status = Status::failure(409, "Conflict", error.to_string());
            for conflict in conflicts {
                let message = format!("conflict with {}", conflict.manager.shown());
                status = status.with_cause("FieldManagerConflict", &message, &conflict.field);
            }
            status
        }
        _ => status::of_malformed(error, call.kind, &call.info.namespace, &call.info.name),
    }
}
