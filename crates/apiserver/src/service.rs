//! The pipeline that every request goes through: who, as whom, may they, how many at once; then the
//! engine, a subresource, or a path that is no resource.

use std::{
    convert::Infallible,
    panic::AssertUnwindSafe,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::{FutureExt, future::BoxFuture};
use http::{Request, Response, header};
use http_body::Body;
use http_body_util::BodyExt;
use hypernetes_apimachinery::{
    ResourceKind, Status, crd::CustomKind, kinds, selector::FieldSelector,
};
use hypernetes_identity::User;
use tokio::time::{Instant, timeout};
use tower::Service;

use crate::{
    api_services,
    audit::Record,
    authentication::{self, InProcessUser},
    body::{self, ApiBody, BoxError},
    customs::Customs,
    endpoints::Endpoints,
    engine::{self, Call, Part},
    flow::Place,
    images::{self, Images},
    metrics::StreamGuard,
    pods::{self, Pods},
    query::Query,
    rbac::Action,
    request_info::RequestInfo,
    reviews, scale,
    server::Inner,
    status::Result,
    usage,
};

/// The server as a tower service. Clones share the server.
#[derive(Debug, Clone)]
pub struct ApiService {
    pub(crate) inner: Arc<Inner>,
    /// The caller, for requests from inside this process.
    pub(crate) user: Option<User>,
}

impl<B> Service<Request<B>> for ApiService
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<ApiBody>;
    type Error = Infallible;
    type Future = BoxFuture<'static, std::result::Result<Response<ApiBody>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::result::Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let mut request = request.map(|body| body.map_err(Into::into).boxed_unsync());
        if let Some(user) = &self.user {
            request.extensions_mut().insert(InProcessUser(user.clone()));
        }
        let inner = Arc::clone(&self.inner);
        async move { Ok(inner.serve(request).await) }.boxed()
    }
}

/// What is told of a request before it is looked at further.
struct Arrived {
    info: RequestInfo,
    query: Query,
    kind: Option<&'static ResourceKind>,
    custom: Option<Arc<CustomKind>>,
}

impl Arrived {
    fn new(request: &Request<ApiBody>, customs: &Customs) -> Self {
        let query = Query::parse(request.uri().query().unwrap_or_default());
        let mut info = RequestInfo::new(request.method(), request.uri().path(), &query);
        let mut kind = kinds::by_resource(&info.group, &info.version, &info.resource)
            .filter(|_| info.is_resource);
        let mut custom = None;
        if kind.is_none() && info.is_resource && !info.group.is_empty() {
            // What cannot be read is as if it were not there; the store says why to whoever writes.
            custom = customs
                .find(&info.group, &info.version, &info.resource)
                .unwrap_or_default();
            kind = custom.as_ref().map(|custom| custom.kind);
        }
        if let Some(kind) = kind
            && info.name.is_empty()
            && matches!(info.verb, "list" | "watch" | "deletecollection")
        {
            // A selection of one name is authorized as that name. The parser must be the one that
            // selects: where two read a text differently, more is shown than was authorized.
            let selector = query.get("fieldSelector").unwrap_or_default();
            let more = engine::selectable(custom.as_deref());
            if let Ok(selector) = FieldSelector::parse_with(selector, kind, more)
                && let Some(name) = selector.pinned("metadata.name")
            {
                info.name = name.to_owned();
            }
        }
        Self {
            info,
            query,
            kind,
            custom,
        }
    }

    fn is_long_running(&self) -> bool {
        self.info.verb == "watch"
            || matches!(
                self.info.subresource.as_str(),
                "exec" | "attach" | "portforward"
            )
            || self.info.subresource == "log" && self.query.flag("follow")
            || self.kind.is_some_and(images::is_image)
                && matches!(self.info.subresource.as_str(), "archive" | "pull" | "push")
    }

    /// Resource and subresource as metrics name them: only what exists.
    fn label(&self) -> (&'static str, &'static str) {
        self.kind.map_or(("", ""), |kind| {
            (
                kind.plural,
                kind.subresource(&self.info.subresource)
                    .map_or("", |sub| sub.name),
            )
        })
    }
}

/// What upstream says to whoever asks for Endpoints.
const ENDPOINTS_WARNING: &str =
    "v1 Endpoints is deprecated in v1.33+; use discovery.k8s.io/v1 EndpointSlice";

impl Inner {
    async fn serve(self: Arc<Self>, request: Request<ApiBody>) -> Response<ApiBody> {
        let started = Instant::now();
        let arrived = Arrived::new(&request, &self.engine.customs);
        let long_running = arrived.is_long_running();
        let (verb, label) = (arrived.info.verb, arrived.label());
        let record = self.audit.as_ref().map(|audit| audit.record(&request));
        let info = record.as_ref().map(|_| arrived.info.clone());
        let handled = self.handle(request, arrived, record.as_ref());
        let handled = AssertUnwindSafe(handled).catch_unwind();
        let result = if long_running {
            Ok(handled.await)
        } else {
            timeout(self.engine.limits.request_timeout, handled).await
        };
        let mut response = match result {
            Ok(Ok(Ok(response))) => response,
            Ok(Ok(Err(status))) => body::status(&status),
            Ok(Err(_panic)) => {
                tracing::error!(verb, resource = label.0, "a request made the server panic");
                body::status(&Status::internal("the request could not be served"))
            }
            Err(_elapsed) => body::status(&Status::failure(
                504,
                "Timeout",
                "request did not complete within the allotted timeout",
            )),
        };
        if let (Some(audit), Some(record), Some(info)) = (&self.audit, record, &info) {
            audit
                .answered(record, info, long_running, &mut response)
                .await;
        }
        let took = started.elapsed();
        let code = response.status().as_u16();
        self.metrics
            .record(verb, label, code, (!long_running).then_some(took));
        tracing::debug!(
            verb,
            resource = label.0,
            subresource = label.1,
            code,
            ?took,
            "request"
        );
        response
    }

    async fn handle(
        self: &Arc<Self>,
        request: Request<ApiBody>,
        arrived: Arrived,
        record: Option<&Record>,
    ) -> Result<Response<ApiBody>> {
        let long_running = arrived.is_long_running();
        let Arrived {
            info,
            query,
            kind,
            custom,
        } = arrived;
        let (parts, body) = request.into_parts();
        let caller = authentication::authenticate(&self.authenticators, &parts).await?;
        if let Some(record) = record {
            record.called_by(&caller);
        }
        let authorizer = &self.engine.authorizer;
        let user = authentication::impersonate(authorizer, caller, &parts.headers)?;
        if let Some(record) = record {
            record.acts_as(&user);
        }
        let slot = Slot {
            _place: self.flow.enter(&user, long_running, &self.engine.limits)?,
            _stream: long_running.then(|| self.metrics.stream()),
        };
        authorizer.check(&user, &Action::of(&info))?;
        if !info.is_resource {
            let endpoints = Endpoints {
                version: &self.version,
                server_address: &self.server_address,
                metrics: &self.metrics,
                ready: !self.engine.shutdown.is_cancelled(),
                customs: &self.engine.customs,
            };
            let served = endpoints.serve(&parts.method, parts.uri.path(), &query, &parts.headers);
            return served.await;
        }
        let kind = kind.ok_or_else(Status::no_resource)?;
        let mut parts = parts;
        let headers = std::mem::take(&mut parts.headers);
        let call = Call {
            kind,
            custom,
            info,
            query,
            headers,
            user,
        };
        let mut rest = Request::from_parts(parts, ());
        self.resource(&call, &mut rest, body, slot).await
    }

    async fn resource(
        self: &Arc<Self>,
        call: &Call,
        rest: &mut Request<()>,
        body: ApiBody,
        slot: Slot,
    ) -> Result<Response<ApiBody>> {
        let (kind, info) = (call.kind, &call.info);
        if kind.kind == "Node" && kind.group.is_empty() && info.subresource == "proxy" {
            return match info.verb {
                "get" => self.metrics.of_node(call).await,
                _ => Err(Status::method_not_allowed()),
            };
        }
        let about_namespace = kind.plural == "namespaces" && kind.group.is_empty();
        if !info.rest.is_empty()
            || [&info.namespace, &info.name]
                .into_iter()
                .any(|part| part.contains('/'))
            || !kind.namespaced && !info.namespace.is_empty() && !about_namespace
        {
            return Err(Status::no_resource());
        }
        if kind.namespaced && info.namespace.is_empty() {
            let across = matches!(info.verb, "list" | "watch") && info.subresource.is_empty();
            if !across {
                return Err(if info.name.is_empty() {
                    Status::method_not_allowed()
                } else {
                    Status::no_resource()
                });
            }
        }
        if !info.subresource.is_empty() {
            return self.subresource(call, rest, body, slot).await;
        }
        let named = matches!(info.verb, "get" | "update" | "patch" | "delete");
        if !kind.allows(info.verb)
            || named && info.name.is_empty()
            || info.verb == "create" && !info.name.is_empty()
        {
            return Err(Status::method_not_allowed());
        }
        let engine = &self.engine;
        if usage::is_usage(kind) {
            return usage::serve(engine, call);
        }
        if api_services::is_api_service(kind) {
            return api_services::serve(engine, call);
        }
        let answer = self.object(call, body, slot).await;
        if kind.kind == "Endpoints" {
            return answer.map(|mut response| {
                body::warn(&mut response, &[ENDPOINTS_WARNING.to_owned()]);
                response
            });
        }
        answer
    }

    /// The verbs of stored kinds, and of those that exist as requests only.
    async fn object(&self, call: &Call, body: ApiBody, slot: Slot) -> Result<Response<ApiBody>> {
        let (engine, kind) = (&self.engine, call.kind);
        match call.info.verb {
            "get" => engine.get(call).await,
            "list" => engine.list(call).await,
            "watch" => Ok(hold(engine.watch(call).await?, slot)),
            verb => {
                let bytes = body::read(body).await?;
                match verb {
                    "create" if !kind.is_stored() => {
                        let asked = reviews::Authenticators {
                            all: &self.authenticators,
                            service_accounts: self.service_accounts.as_ref(),
                        };
                        reviews::serve(engine, &asked, call, &bytes).await
                    }
                    "create" => engine.create(call, &bytes).await,
                    "update" => engine.update(call, Part::Main, &bytes).await,
                    "patch" => engine.patch(call, Part::Main, &bytes).await,
                    "delete" => engine.delete(call, &bytes).await,
                    "deletecollection" => engine.delete_collection(call, &bytes).await,
                    _ => Err(Status::method_not_allowed()),
                }
            }
        }
    }

    async fn subresource(
        self: &Arc<Self>,
        call: &Call,
        rest: &mut Request<()>,
        body: ApiBody,
        slot: Slot,
    ) -> Result<Response<ApiBody>> {
        let info = &call.info;
        let subresource = call
            .kind
            .subresource(&info.subresource)
            .ok_or_else(Status::no_resource)?;
        if info.name.is_empty() {
            return Err(Status::no_resource());
        }
        if !subresource.verbs.contains(&info.verb) {
            return Err(Status::method_not_allowed());
        }
        let engine = &self.engine;
        let part = match subresource.name {
            "status" => Some(Part::Status),
            "approval" => Some(Part::Approval),
            "finalize" => Some(Part::Finalize),
            "ephemeralcontainers" => Some(Part::Ephemeral),
            "resize" => Some(Part::Resize),
            _ => None,
        };
        if let Some(part) = part {
            return match info.verb {
                "get" => engine.get(call).await,
                "update" => engine.update(call, part, &body::read(body).await?).await,
                "patch" => engine.patch(call, part, &body::read(body).await?).await,
                _ => Err(Status::method_not_allowed()),
            };
        }
        if subresource.name == "scale" {
            let bytes = match info.verb {
                "get" => Bytes::new(),
                _ => body::read(body).await?,
            };
            return scale::serve(engine, call, &bytes).await;
        }
        if subresource.name == "token" {
            let accounts = self.service_accounts.as_ref().ok_or_else(|| {
                Status::unavailable("this API server has no key for service account tokens")
            })?;
            return accounts.issue(engine, call, &body::read(body).await?);
        }
        if images::is_image(call.kind) {
            let images = Images { inner: self, call };
            return images.serve(body, slot).await;
        }
        if !pods::is_pod(call.kind) {
            return Err(Status::method_not_allowed());
        }
        let pods = Pods {
            engine,
            streams: self.streams.as_ref(),
            call,
        };
        match subresource.name {
            "log" => timed(pods.log(slot)).await,
            "exec" | "attach" => {
                restore_headers(rest, call);
                timed(pods.process(rest, slot)).await
            }
            "portforward" => {
                restore_headers(rest, call);
                timed(pods.port_forward(rest, slot)).await
            }
            "binding" => pods.bind(&body::read(body).await?).await,
            "eviction" => pods.evict(&body::read(body).await?).await,
            _ => Err(Status::method_not_allowed()),
        }
    }
}

/// The wire's negotiation looks at the headers, which the call holds.
fn restore_headers(rest: &mut Request<()>, call: &Call) {
    *rest.headers_mut() = call.headers.clone();
    rest.headers_mut().remove(header::AUTHORIZATION);
}

/// Bounds the time until a stream begins.
async fn timed<F: Future<Output = Result<Response<ApiBody>>>>(
    future: F,
) -> Result<Response<ApiBody>> {
    timeout(pods::BEGIN, future).await.unwrap_or_else(|_| {
        Err(Status::failure(
            504,
            "Timeout",
            "the node did not answer in time",
        ))
    })
}

/// What a request holds for as long as it, or the stream that it opened, goes on.
#[derive(Debug)]
pub(crate) struct Slot {
    _place: Place,
    _stream: Option<StreamGuard>,
}

/// Keeps the slot until the body has been sent, or the client is gone.
fn hold(response: Response<ApiBody>, slot: Slot) -> Response<ApiBody> {
    response.map(|body| Held { body, _slot: slot }.boxed_unsync())
}

struct Held {
    body: ApiBody,
    _slot: Slot,
}

impl Body for Held {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<http_body::Frame<Bytes>, BoxError>>> {
        std::pin::Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}
