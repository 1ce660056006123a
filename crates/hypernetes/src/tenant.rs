//! `hypernetes tenant`: a client of the API with the operator's kubeconfig.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result, bail};
use hypernetes_identity::{Authority, Kubeconfig, TenantRole, tenant_group};
use hypernetes_types::{
    TenantName,
    kinds::{GROUP, VERSION},
};
use kube::{
    Api, Client,
    api::{DeleteParams, DynamicObject, ListParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig as AdminKubeconfig},
    core::{ApiResource, GroupVersionKind},
};
use serde_json::{Value, json};

use crate::{
    cli::{Role, Tenant},
    paths::Paths,
    terminal,
};

/// Runs one `tenant` verb.
pub(crate) async fn run(paths: &Paths, command: Tenant) -> Result<()> {
    match command {
        Tenant::Create {
            name,
            kubeconfig,
            cidr,
            display_name,
            kernels,
            node_ports,
            storage,
        } => {
            let name = parse(&name)?;
            let mut spec = json!({"network": {"default": {"cidr": cidr.trunc().to_string()}}});
            if let Some(text) = display_name {
                spec["displayName"] = text.into();
            }
            if !kernels.is_empty() {
                spec["kernels"] = kernels.into();
            }
            if let Some(count) = node_ports {
                spec["nodePorts"] = count.into();
            }
            spec["storage"] = storage.into();
            create(paths, &name, spec).await?;
            if let Some(path) = kubeconfig {
                write_kubeconfig(
                    paths,
                    &name,
                    &format!("{name}-admin"),
                    Role::Admin,
                    365,
                    &path,
                )
                .await?;
            }
            terminal::line(&format!("tenant/{name} created"));
            Ok(())
        }
        Tenant::Ls => list(paths).await,
        Tenant::Kubeconfig {
            name,
            output,
            user,
            role,
            days,
        } => {
            let name = parse(&name)?;
            tenants(paths)
                .await?
                .get(name.as_str())
                .await
                .map_err(not_found(&name))?;
            let user = user.unwrap_or_else(|| format!("{name}-{}", role.as_str()));
            write_kubeconfig(paths, &name, &user, role, days, &output).await
        }
        Tenant::Delete {
            name,
            no_wait,
            timeout,
        } => {
            let name = parse(&name)?;
            delete(
                paths,
                &name,
                (!no_wait).then(|| Duration::from_secs(timeout)),
            )
            .await
        }
    }
}

fn parse(name: &str) -> Result<TenantName> {
    Ok(name.parse::<TenantName>()?)
}

/// A client with the operator's credentials, as `up` wrote them.
async fn client(paths: &Paths) -> Result<Client> {
    let path = paths.admin_kubeconfig();
    let kubeconfig = AdminKubeconfig::read_from(&path).with_context(|| {
        format!(
            "cannot read {}; is `hypernetes up` running with this --state-dir?",
            path.display()
        )
    })?;
    let config =
        kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

async fn tenants(paths: &Paths) -> Result<Api<DynamicObject>> {
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(GROUP, VERSION, "Tenant"));
    Ok(Api::all_with(client(paths).await?, &resource))
}

fn not_found(name: &TenantName) -> impl FnOnce(kube::Error) -> anyhow::Error {
    let name = name.clone();
    move |error| match error {
        kube::Error::Api(status) if status.code == 404 => {
            anyhow::anyhow!("tenant {name} not found")
        }
        other => api_error(other),
    }
}

/// The server's own sentence, without the client's wrapping.
fn api_error(error: kube::Error) -> anyhow::Error {
    match error {
        kube::Error::Api(status) => anyhow::anyhow!("{}", status.message),
        other => anyhow::Error::new(other).context("cannot reach the API server"),
    }
}

async fn create(paths: &Paths, name: &TenantName, spec: Value) -> Result<()> {
    let api = tenants(paths).await?;
    let object: DynamicObject = serde_json::from_value(json!({
        "apiVersion": format!("{GROUP}/{VERSION}"),
        "kind": "Tenant",
        "metadata": {"name": name.as_str()},
        "spec": spec,
    }))?;
    api.create(&PostParams::default(), &object)
        .await
        .map_err(api_error)?;
    wait_ready(&api, name).await
}

/// Waits until the controllers have made the tenant's namespace, network and roles.
async fn wait_ready(api: &Api<DynamicObject>, name: &TenantName) -> Result<()> {
    let limit = Duration::from_secs(60);
    let ready = kube::runtime::wait::await_condition(
        api.clone(),
        name.as_str(),
        |object: Option<&DynamicObject>| {
            object.is_some_and(|tenant| condition(tenant, "Ready").0 == "True")
        },
    );
    match tokio::time::timeout(limit, ready).await {
        Ok(result) => result.map(|_| ()).context("cannot watch the tenant"),
        Err(_elapsed) => {
            let tenant = api.get(name.as_str()).await.map_err(api_error)?;
            bail!(
                "tenant {name} is not ready after {limit:?}: {}",
                condition(&tenant, "Ready").1
            )
        }
    }
}

/// Status and message of a condition.
fn condition(object: &DynamicObject, kind: &str) -> (String, String) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    object.data["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|condition| condition["type"] == kind)
        .map_or_else(
            || {
                (
                    "Unknown".to_owned(),
                    "no controller has looked at it".to_owned(),
                )
            },
            |condition| (text(&condition["status"]), text(&condition["message"])),
        )
}

async fn list(paths: &Paths) -> Result<()> {
    let tenants = tenants(paths)
        .await?
        .list(&ListParams::default())
        .await
        .map_err(api_error)?;
    let rows = tenants.items.iter().map(|tenant| {
        vec![
            tenant.metadata.name.clone().unwrap_or_default(),
            tenant.data["spec"]["network"]["default"]["cidr"]
                .as_str()
                .unwrap_or("-")
                .to_owned(),
            condition(tenant, "Ready").0,
            tenant.data["spec"]["displayName"]
                .as_str()
                .unwrap_or("-")
                .to_owned(),
        ]
    });
    terminal::table(&["NAME", "CIDR", "READY", "DISPLAY NAME"], rows);
    Ok(())
}

async fn write_kubeconfig(
    paths: &Paths,
    tenant: &TenantName,
    user: &str,
    role: Role,
    days: u32,
    output: &Path,
) -> Result<()> {
    let authority = Authority::load_or_create(&paths.pki())
        .context("cannot read the cluster's certificate authority; run as the daemon's user")?;
    let life = Duration::from_secs(u64::from(days) * 24 * 3600);
    let credentials = authority.client(user, &[tenant_group(tenant, role.into())], life)?;
    let admin = AdminKubeconfig::read_from(paths.admin_kubeconfig())?;
    let server = admin
        .clusters
        .first()
        .and_then(|cluster| cluster.cluster.as_ref()?.server.clone())
        .context("the operator's kubeconfig names no server")?;
    let kubeconfig = Kubeconfig {
        server: &server,
        context: tenant.as_str(),
        user,
        namespace: tenant.as_str(),
        authority: &authority,
        credentials: &credentials,
    };
    if output == Path::new("-") {
        terminal::raw(&kubeconfig.to_yaml());
        return Ok(());
    }
    Ok(kubeconfig.write(output)?)
}

async fn delete(paths: &Paths, name: &TenantName, wait: Option<Duration>) -> Result<()> {
    let api = tenants(paths).await?;
    let deleted = api
        .delete(name.as_str(), &DeleteParams::default())
        .await
        .map_err(not_found(name))?;
    let uid = match deleted {
        either::Either::Left(object) => object.metadata.uid,
        either::Either::Right(_status) => None,
    };
    if let (Some(limit), Some(uid)) = (wait, uid) {
        let gone = kube::runtime::wait::await_condition(
            api.clone(),
            name.as_str(),
            kube::runtime::wait::conditions::is_deleted(&uid),
        );
        match tokio::time::timeout(limit, gone).await {
            Ok(result) => result.map(|_| ()).context("cannot watch the tenant")?,
            Err(_elapsed) => bail!("tenant {name} is still being deleted after {limit:?}"),
        }
    }
    terminal::line(&format!("tenant/{name} deleted"));
    Ok(())
}

impl From<Role> for TenantRole {
    fn from(role: Role) -> Self {
        match role {
            Role::Admin => Self::Admin,
            Role::Edit => Self::Edit,
            Role::View => Self::View,
        }
    }
}
