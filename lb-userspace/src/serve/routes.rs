//! The paths: the page at `/`, `/metrics`, `/-/healthy`, `/-/ready` and `/-/ready/SERVICE`, `/api/v1/…`.

use axum::{
    Json, Router,
    extract::{Path, Query, Request, State},
    http::{
        HeaderMap, HeaderValue, StatusCode,
        header::{self, HeaderName},
    },
    middleware::{self, Next},
    response::{IntoResponse as _, Response},
    routing::get,
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    Shared, Source,
    metrics::{self, Exposed},
};
use crate::{
    cli,
    datapath::TableSet,
    events::KEPT,
    explain::{self, Question},
    health::Verdict,
    inventory::Inventory,
    report::{Drained, now},
};

/// Everything that is served. Where only this machine gets there (`local`), a browser that was led here by a name of
/// somebody else's is refused.
pub fn router(shared: Shared, local: bool) -> Router {
    Router::new()
        .route(
            "/",
            get(async || {
                ([(header::CONTENT_TYPE, "text/html; charset=utf-8")], include_str!("page/index.html"))
            }),
        )
        .route(
            "/app.js",
            get(async || {
                ([(header::CONTENT_TYPE, "text/javascript; charset=utf-8")], include_str!("page/app.js"))
            }),
        )
        .route(
            "/style.css",
            get(async || {
                ([(header::CONTENT_TYPE, "text/css; charset=utf-8")], include_str!("page/style.css"))
            }),
        )
        .route("/metrics", get(scrape))
        .route("/-/healthy", get(async || "healthy\n"))
        .route("/-/ready", get(ready))
        .route("/-/ready/{service}", get(service_ready))
        .route("/api/v1/overview", get(overview))
        .route("/api/v1/events", get(events))
        .route("/api/v1/client", get(client))
        .route("/api/v1/explain", get(move |state, query, head| explained(local, state, query, head)))
        .with_state(shared)
        .layer(middleware::from_fn(move |request: Request, next: Next| guard(local, request, next)))
}

/// Headers that keep what is served to itself, and names that a page elsewhere may have been given for this address.
async fn guard(local: bool, request: Request, next: Next) -> Response {
    if local && !is_own(request.headers().get(header::HOST)) {
        return (StatusCode::MISDIRECTED_REQUEST, "ask for this by its address\n").into_response();
    }
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    const HEADERS: [(HeaderName, &str); 4] = [
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; \
             base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        ),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    for (name, value) in HEADERS {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
    response
}

/// Whether a request names this machine. Over a socket of the file system, and from old clients, it names nothing.
fn is_own(host: Option<&HeaderValue>) -> bool {
    let Some(host) = host else { return true };
    let host = host.to_str().unwrap_or_default();
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.trim_matches(['[', ']']);
    name.is_empty() || name == "localhost" || name.parse::<std::net::IpAddr>().is_ok()
}

type Answer = Result<Response, Failure>;

/// What went wrong, in words.
struct Failure(anyhow::Error);

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl axum::response::IntoResponse for Failure {
    fn into_response(self) -> Response {
        (StatusCode::INTERNAL_SERVER_ERROR, format!("{:#}\n", self.0)).into_response()
    }
}

/// Reads on a thread of its own: the controllers' work is not held up.
async fn read(shared: Shared) -> Result<Vec<(String, anyhow::Result<Exposed>)>, Failure> {
    Ok(tokio::task::spawn_blocking(move || shared.read()).await?)
}

async fn scrape(State(shared): State<Shared>) -> Answer {
    let events = shared.events.as_ref().map(|events| events.counts()).unwrap_or_default();
    let text = tokio::task::spawn_blocking(move || {
        let exposed: anyhow::Result<Vec<Exposed>> = shared.read().into_iter().map(|(_, read)| read).collect();
        anyhow::Ok(metrics::text(exposed?, events)?)
    });
    Ok(([(header::CONTENT_TYPE, metrics::MEDIA_TYPE)], text.await??).into_response())
}

/// Why no new connections should be sent here: an interface is not served, or somebody has drained this node. `further` says more
/// of an interface that is served.
async fn unready(
    shared: Shared,
    further: impl Fn(&Inventory) -> Option<String>,
) -> Result<Vec<String>, Failure> {
    let mut reasons = Vec::new();
    for (interface, read) in read(shared).await? {
        let mut say = |reason: String| reasons.push(format!("{interface}: {reason}"));
        match read {
            Err(error) => say(format!("{error:#}")),
            Ok(exposed) if exposed.health.verdict == Verdict::Starting => {
                say("attach is starting".to_owned())
            }
            Ok(exposed) => {
                let inventory = &exposed.inventory;
                let this = inventory.nodes().into_iter().find(|node| node.this).map(|node| node.id);
                let drained = |drain: &crate::report::Drain| {
                    drain.what == Drained::Node && Some(&drain.name) == this.as_ref()
                };
                if inventory.drains.iter().any(drained) {
                    say("this node is drained by hand".to_owned());
                }
                further(inventory).into_iter().for_each(say);
            }
        }
    }
    Ok(reasons)
}

fn readiness(reasons: &[String]) -> Response {
    match reasons {
        [] => "ready\n".into_response(),
        reasons => (StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n").into_response(),
    }
}

/// Whether new connections should be sent here: every interface is served, and nobody has drained this node.
async fn ready(State(shared): State<Shared>) -> Answer {
    Ok(readiness(&unready(shared, |_| None).await?))
}

/// The same for a service, to which new connections find a task here as well.
async fn service_ready(State(shared): State<Shared>, Path(name): Path<String>) -> Answer {
    let further = |inventory: &Inventory| match inventory.service(&name) {
        None => Some(format!("there is no service {name:?}")),
        Some(number) => match inventory.tables.takers().get(&number) {
            Some(true) => None,
            Some(false) => Some("no task gets new connections here".to_owned()),
            None => Some("it is not served here".to_owned()),
        },
    };
    Ok(readiness(&unready(shared, further).await?))
}

/// Everything that the page shows of this node.
async fn overview(State(shared): State<Shared>) -> Answer {
    let mut interfaces = Vec::new();
    for (interface, read) in read(shared).await? {
        interfaces.push(match read {
            Ok(exposed) => document(&exposed)?,
            Err(error) => json!({ "interface": interface, "error": format!("{error:#}") }),
        });
    }
    Ok(Json(json!({ "schema": crate::report::SCHEMA, "now": now(), "interfaces": interfaces }))
        .into_response())
}

fn document(exposed: &Exposed) -> Result<Value, Failure> {
    let (inventory, around) = (&exposed.inventory, &exposed.around);
    let outcomes = inventory.counters.outcomes.iter().filter(|count| count.packets > 0).map(|count| {
        let outcome = count.outcome;
        json!({
            "name": outcome.name(), "packets": count.packets, "help": outcome.help(),
            "forwarded": outcome.is_forwarded(), "dropped": outcome.is_dropped(),
        })
    });
    let mode = lb_common::abi::Mode::try_from(around.config.mode);
    Ok(json!({
        "interface": inventory.interface,
        "verdict": exposed.health.verdict,
        "problems": exposed.health.problems,
        "mode": mode.map_or("not attached", lb_common::abi::Mode::name),
        "controller": around.controller,
        "started": inventory.report.started,
        "source": inventory.report.kind,
        "since": inventory.report.since,
        "services": inventory.services(),
        "tasks": inventory.tasks(|_| true, exposed.open.as_ref()),
        "nodes": inventory.nodes(),
        "outcomes": outcomes.collect::<Vec<_>>(),
        "fills": around.fills,
        "drains": inventory.drains,
        "flooded": inventory.report.flooded,
    }))
}

#[derive(Deserialize)]
struct Last {
    last: Option<usize>,
}

async fn events(State(shared): State<Shared>, Query(asked): Query<Last>) -> Answer {
    let last = asked.last.unwrap_or(KEPT);
    let events = shared.events.as_ref().map(|events| events.last(last)).unwrap_or_default();
    Ok(Json(json!({ "schema": crate::report::SCHEMA, "events": events })).into_response())
}

#[derive(Deserialize)]
struct Known {
    address: String,
}

/// Who it is that a task of this node saw as an address of the pool.
async fn client(State(shared): State<Shared>, Query(asked): Query<Known>) -> Answer {
    let Ok(address) = asked.address.parse::<std::net::Ipv4Addr>() else {
        let text = format!("{:?} is no IPv4 address; ask for the one that a task saw\n", asked.address);
        return Ok((StatusCode::BAD_REQUEST, text).into_response());
    };
    let found = tokio::task::spawn_blocking(move || {
        // One that cannot be read does not hide what another one knows.
        let mut failed = None;
        for source in shared.sources.iter() {
            match TableSet::of(source.interface()).and_then(|set| set.alias(address)) {
                Ok(Some(client)) => return Ok(Some((source.interface().to_owned(), client))),
                Ok(None) => {}
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(None), |error| Err(anyhow::Error::from(error)))
    });
    match found.await?? {
        Some((interface, client)) => {
            let document = json!({ "interface": interface, "address": address, "client": client });
            Ok(Json(document).into_response())
        }
        None => {
            Ok((StatusCode::NOT_FOUND, format!("no client is known by {address} here now\n")).into_response())
        }
    }
}

#[derive(Deserialize)]
struct Packet {
    protocol: String,
    client: String,
    listener: String,
}

/// What would become of a packet, by [`explain`]. The kernel verifies a program for it: it is answered to this machine alone, to no
/// page elsewhere that leads a browser here, and to one at a time.
async fn explained(
    local: bool,
    State(shared): State<Shared>,
    Query(packet): Query<Packet>,
    headers: HeaderMap,
) -> Answer {
    let from = headers.get("sec-fetch-site").and_then(|site| site.to_str().ok());
    if !local || from.is_some_and(|site| !matches!(site, "same-origin" | "none")) {
        let text = "packets are explained on the node itself: `lb-userspace explain`, or the page at an address of its loopback\n";
        return Ok((StatusCode::FORBIDDEN, text).into_response());
    }
    let question = match question(&packet) {
        Ok(question) => question,
        Err(reason) => return Ok((StatusCode::BAD_REQUEST, format!("{reason}\n")).into_response()),
    };
    let Ok(turn) = shared.explains.clone().try_lock_owned() else {
        let text = "another packet is being explained: ask again in a second\n";
        return Ok((StatusCode::TOO_MANY_REQUESTS, text).into_response());
    };
    let asked = tokio::task::spawn_blocking(move || {
        // Whoever asked may go; the work does not end with him.
        let _turn = turn;
        let names = shared.sources.iter().map(Source::interface);
        let read = names.map(|name| {
            let set = TableSet::of(name)?;
            anyhow::Ok((Inventory::read(name, &set)?, set))
        });
        explain::document(&read.collect::<Result<Vec<_>, _>>()?, &question)
    });
    match asked.await? {
        Ok(document) => Ok(Json(document).into_response()),
        Err(error) => Ok((StatusCode::UNPROCESSABLE_ENTITY, format!("{error:#}\n")).into_response()),
    }
}

fn question(packet: &Packet) -> Result<Question, String> {
    Ok(Question {
        protocol: cli::protocol(&packet.protocol)?,
        client: cli::client(&packet.client).map_err(|error| format!("the client: {error}"))?,
        listener: cli::listener(&packet.listener).map_err(|error| format!("where to: {error}"))?,
        established: false,
        through: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_are_its_own() {
        let own = |host: &str| is_own(Some(&HeaderValue::from_str(host).unwrap()));
        for good in ["127.0.0.1:9464", "localhost:9464", "localhost", "[::1]:9464", "192.0.2.1"] {
            assert!(own(good), "{good}");
        }
        for bad in ["evil.example:9464", "localhost.evil.example"] {
            assert!(!own(bad), "{bad}");
        }
        assert!(is_own(None));
    }
}
