//! What a request asks for, told from its method, path and query.
//!
//! The grammar is Kubernetes': `/api/<version>/…` for the core group, `/apis/<group>/<version>/…` for
//! others, then `[watch/][namespaces/<namespace>/]<resource>[/<name>[/<subresource>]]`. Everything
//! else is a path that is not a resource.

use http::Method;

use crate::query::{Query, decode};

/// What a request asks for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct RequestInfo {
    /// Path as sent.
    pub(crate) path: String,
    /// Verb as authorization knows it.
    pub(crate) verb: &'static str,
    /// Whether the rest is filled in.
    pub(crate) is_resource: bool,
    /// API group; empty for core.
    pub(crate) group: String,
    /// API version.
    pub(crate) version: String,
    /// Namespace; empty for cluster-wide requests.
    pub(crate) namespace: String,
    /// Resource in plural.
    pub(crate) resource: String,
    /// Subresource, or empty.
    pub(crate) subresource: String,
    /// Object name, or empty.
    pub(crate) name: String,
    /// Path segments after the subresource.
    pub(crate) rest: Vec<String>,
}

impl RequestInfo {
    /// Reads method, path and query. Whether the resource exists is not looked at.
    pub(crate) fn new(method: &Method, path: &str, query: &Query) -> Self {
        let mut info = Self {
            path: path.to_owned(),
            verb: non_resource_verb(method),
            ..Self::default()
        };
        let segments: Vec<String> = path
            .split('/')
            .filter(|s| !s.is_empty())
            .map(|s| decode(s, false))
            .collect();
        let mut rest = match segments.first().map(String::as_str) {
            Some("api") if segments.len() > 2 => {
                info.version.clone_from(&segments[1]);
                &segments[2..]
            }
            Some("apis") if segments.len() > 3 => {
                info.group.clone_from(&segments[1]);
                info.version.clone_from(&segments[2]);
                &segments[3..]
            }
            _ => return info,
        };
        let mut watch = query.flag("watch");
        if rest[0] == "watch" {
            watch = true;
            rest = &rest[1..];
        }
        if rest.is_empty() {
            return Self {
                path: info.path,
                verb: info.verb,
                ..Self::default()
            };
        }
        info.is_resource = true;
        let parts: &[String] = if rest[0] == "namespaces" {
            if rest.len() > 1 {
                info.namespace.clone_from(&rest[1]);
            }
            // `namespaces/<name>` and its subresources are about the namespace itself.
            let about_itself =
                rest.len() < 3 || (rest.len() == 3 && is_namespace_subresource(&rest[2]));
            if about_itself { rest } else { &rest[2..] }
        } else {
            rest
        };
        let part = |index: usize| parts.get(index).cloned().unwrap_or_default();
        info.resource = part(0);
        info.name = part(1);
        info.subresource = part(2);
        info.rest = parts.iter().skip(3).cloned().collect();
        info.verb = resource_verb(method, !info.name.is_empty(), watch);
        info
    }
}

fn is_namespace_subresource(text: &str) -> bool {
    matches!(text, "status" | "finalize")
}

fn non_resource_verb(method: &Method) -> &'static str {
    match *method {
        Method::GET => "get",
        Method::HEAD => "head",
        Method::POST => "post",
        Method::PUT => "put",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        Method::OPTIONS => "options",
        _ => "",
    }
}

fn resource_verb(method: &Method, named: bool, watch: bool) -> &'static str {
    match *method {
        Method::GET | Method::HEAD if watch => "watch",
        Method::GET | Method::HEAD if named => "get",
        Method::GET | Method::HEAD => "list",
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE if named => "delete",
        Method::DELETE => "deletecollection",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(method: &Method, target: &str) -> RequestInfo {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        RequestInfo::new(method, path, &Query::parse(query))
    }

    fn line(info: &RequestInfo) -> String {
        format!(
            "{} {}/{} ns={} {} {}",
            info.verb,
            info.group,
            info.version,
            info.namespace,
            [&info.resource, &info.subresource]
                .map(String::as_str)
                .join("/")
                .trim_end_matches('/'),
            info.name
        )
    }

    #[test]
    fn the_grammar_of_paths() {
        let cases = [
            ("GET", "/api/v1/namespaces/a/pods", "list /v1 ns=a pods "),
            (
                "GET",
                "/api/v1/namespaces/a/pods?watch=true",
                "watch /v1 ns=a pods ",
            ),
            (
                "GET",
                "/api/v1/watch/namespaces/a/pods/x",
                "watch /v1 ns=a pods x",
            ),
            (
                "GET",
                "/api/v1/namespaces/a/pods/x/log",
                "get /v1 ns=a pods/log x",
            ),
            (
                "POST",
                "/api/v1/namespaces/a/pods/x/exec",
                "create /v1 ns=a pods/exec x",
            ),
            ("GET", "/api/v1/pods", "list /v1 ns= pods "),
            ("GET", "/api/v1/namespaces", "list /v1 ns= namespaces "),
            (
                "DELETE",
                "/api/v1/namespaces/a",
                "delete /v1 ns=a namespaces a",
            ),
            (
                "PUT",
                "/api/v1/namespaces/a/finalize",
                "update /v1 ns=a namespaces/finalize a",
            ),
            (
                "PATCH",
                "/api/v1/namespaces/a/status",
                "patch /v1 ns=a namespaces/status a",
            ),
            (
                "DELETE",
                "/apis/g/v1/namespaces/a/roles",
                "deletecollection g/v1 ns=a roles ",
            ),
            (
                "GET",
                "/apis/g/v1/clusterroles/system%3Ax",
                "get g/v1 ns= clusterroles system:x",
            ),
        ];
        for (method, target, expected) in cases {
            let info = info(&method.parse().unwrap(), target);
            assert!(info.is_resource, "{target}");
            assert_eq!(line(&info), expected, "{method} {target}");
        }
    }

    #[test]
    fn other_paths_are_no_resources() {
        for path in [
            "/",
            "/api",
            "/api/v1",
            "/apis",
            "/apis/g",
            "/apis/g/v1",
            "/healthz",
            "/version",
        ] {
            let info = info(&Method::GET, path);
            assert!(!info.is_resource, "{path}");
            assert_eq!(info.verb, "get");
        }
    }
}
