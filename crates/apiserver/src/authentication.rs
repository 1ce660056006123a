//! Who sends a request, and as whom it is to be treated.

use std::{collections::BTreeMap, sync::Arc};

use http::{HeaderMap, request::Parts};
use hypernetes_apimachinery::Status;
use hypernetes_identity::{ANONYMOUS, Authenticator, PeerCertificate, User};

use crate::{
    authorizer::Authorizer,
    query::decode,
    rbac::Action,
    status::{self, Result},
};

/// The caller of a request from inside this process, put into the request's extensions. Requests
/// from the network cannot carry it.
#[derive(Debug, Clone)]
pub struct InProcessUser(pub User);

const USER: &str = "impersonate-user";
const GROUP: &str = "impersonate-group";
const UID: &str = "impersonate-uid";
const EXTRA: &str = "impersonate-extra-";

/// The user whom the credentials name; anonymous if there are none.
pub(crate) async fn authenticate(
    authenticators: &[Arc<dyn Authenticator>],
    parts: &Parts,
) -> Result<User> {
    if let Some(InProcessUser(user)) = parts.extensions.get::<InProcessUser>() {
        return Ok(user.clone());
    }
    let peer = parts.extensions.get::<PeerCertificate>();
    for authenticator in authenticators {
        match authenticator.authenticate(parts, peer).await {
            Ok(Some(user)) => return Ok(user),
            Ok(None) => {}
            Err(error) => return Err(status::of_authentication(&error)),
        }
    }
    // Credentials that nobody knows are not the same as none.
    if parts.headers.contains_key(http::header::AUTHORIZATION) {
        return Err(Status::unauthorized());
    }
    Ok(User::anonymous())
}

/// The user as whom the request is to be treated: the caller, or whom it may impersonate.
pub(crate) fn impersonate(
    authorizer: &Authorizer,
    caller: User,
    headers: &HeaderMap,
) -> Result<User> {
    let texts = |name: &str| -> Vec<String> {
        headers
            .get_all(name)
            .iter()
            .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
            .collect()
    };
    let groups = texts(GROUP);
    let uid = texts(UID).into_iter().next().unwrap_or_default();
    let mut extra: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, value) in headers {
        if let Some(key) = name.as_str().strip_prefix(EXTRA) {
            let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
            extra.entry(decode(key, false)).or_default().push(value);
        }
    }
    let Some(name) = texts(USER)
        .into_iter()
        .next()
        .filter(|name| !name.is_empty())
    else {
        if groups.is_empty() && uid.is_empty() && extra.is_empty() {
            return Ok(caller);
        }
        return Err(Status::internal(
            "requested impersonation without impersonating a user",
        ));
    };
    let mut user = User {
        name,
        uid,
        groups,
        extra,
    };
    let check = |group: &str, resource: &str, subresource: &str, namespace: &str, name: &str| {
        let action = Action {
            verb: "impersonate",
            namespace,
            group,
            resource,
            subresource,
            name,
            path: None,
        };
        authorizer.check(&caller, &action)
    };
    match user.service_account() {
        Some((namespace, account)) => check("", "serviceaccounts", "", namespace, account)?,
        None => check("", "users", "", "", &user.name)?,
    }
    for group in &user.groups {
        check("", "groups", "", "", group)?;
    }
    if !user.uid.is_empty() {
        check("authentication.k8s.io", "uids", "", "", &user.uid)?;
    }
    for (key, values) in &user.extra {
        for value in values {
            check("authentication.k8s.io", "userextras", key, "", value)?;
        }
    }
    if let Some((namespace, _)) = user.service_account()
        && user.groups.is_empty()
    {
        user.groups = vec![
            "system:serviceaccounts".into(),
            format!("system:serviceaccounts:{namespace}"),
        ];
    }
    if user.name == ANONYMOUS {
        user.add_group(hypernetes_identity::ALL_UNAUTHENTICATED);
    } else {
        user.add_group(hypernetes_identity::ALL_AUTHENTICATED);
    }
    Ok(user)
}
