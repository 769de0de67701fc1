//! Asks the tasks of this node, each for itself, from the host: close, and through nothing but the task's own bridge.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use http_body_util::Empty;
use hyper::{Request, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use tokio::{
    net::TcpStream,
    sync::watch,
    task::{JoinHandle, JoinSet},
    time::Instant,
};

use super::{Check, CheckKind, Finding};

/// A task has this time to answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// One that has never passed is asked this often at first, so that nobody waits for it: for [`EAGER_FOR`].
const EAGER: Duration = Duration::from_millis(100);
const EAGER_FOR: Duration = Duration::from_secs(60);
/// One that is asked ever more seldom waits twice as long each time, so often.
const DOUBLED: u32 = 5;

/// A task that is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Where it listens; none while nobody knows. It passes if it does so at any of them.
    pub at: Vec<SocketAddr>,
    /// How.
    pub check: Check,
    /// Whether it is asked ever more seldom while it does not pass.
    pub backs_off: bool,
}

/// The checks of this node's tasks, shared by all who want to know.
#[derive(Clone, Default)]
pub struct Checks(Arc<Shared>);

impl fmt::Debug for Checks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checks").finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Counts what was found anew.
    news: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    /// The tasks that each interface's controller wants asked.
    wanted: BTreeMap<String, BTreeMap<String, Asked>>,
    running: BTreeMap<String, Running>,
    /// What each interface's controller sees of the tasks.
    seen: BTreeMap<String, SeenTasks>,
    /// Who has asked for some, or for none.
    begun: BTreeSet<String>,
    heeded: bool,
}

/// What a controller sees of this node's tasks by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SeenTasks {
    /// Those that have as many connections as they may have.
    pub full: BTreeSet<String>,
    /// Those to which no way leads, and why.
    pub unreached: BTreeMap<String, String>,
}

struct Running {
    asked: Asked,
    finding: Finding,
    job: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.job.abort();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what was found of a task; whether it is still asked so.
    fn keep(&self, task: &str, asked: &Asked, finding: &Finding) -> bool {
        let news = {
            let mut state = self.state();
            let Some(running) = state.running.get_mut(task).filter(|running| running.asked == *asked) else {
                return false;
            };
            // Another reason alone is not worth telling every node.
            let known = &running.finding;
            let news = known.passes != finding.passes || known.why.is_empty() != finding.why.is_empty();
            running.finding = finding.clone();
            news
        };
        if news {
            self.news.send_modify(|count| *count += 1);
        }
        true
    }
}

impl Checks {
    /// Has exactly these tasks asked for an interface's controller from now on. What is `assumed` of those that were not asked before
    /// stands until they are found to be otherwise: a former agent, or nobody, has let connections through.
    pub fn follow(
        &self,
        interface: &str,
        wanted: BTreeMap<String, Asked>,
        assumed: impl Fn(&str) -> Option<bool>,
    ) {
        let mut state = self.0.state();
        let first = state.begun.insert(interface.to_owned());
        if !first && state.wanted.get(interface) == Some(&wanted) {
            return;
        }
        state.wanted.insert(interface.to_owned(), wanted);
        let all: BTreeMap<String, Asked> =
            state.wanted.values().flatten().map(|(task, asked)| (task.clone(), asked.clone())).collect();
        state.running.retain(|task, _| all.contains_key(task));
        for (task, asked) in all {
            let known = state.running.get(&task);
            if known.is_some_and(|known| known.asked == asked) {
                continue;
            }
            // One that is asked otherwise now is what it was until it answers.
            let finding = match known {
                Some(known) => known.finding.clone(),
                None => Finding { passes: assumed(&task), ..Finding::default() },
            };
            let job = tokio::spawn(run(self.0.clone(), task.clone(), asked.clone(), finding.clone()));
            state.running.insert(task, Running { asked, finding, job });
        }
        drop(state);
        if first {
            self.0.news.send_modify(|count| *count += 1);
        }
    }

    /// What was found of a task, if it is asked, or something was seen of it.
    pub fn finding(&self, task: &str) -> Option<Finding> {
        let state = self.0.state();
        let full = state.seen.values().any(|seen| seen.full.contains(task));
        let unreached = state.seen.values().find_map(|seen| seen.unreached.get(task)).cloned();
        let asked = state.running.get(task).map(|running| running.finding.clone());
        let finding = asked.or_else(|| (full || unreached.is_some()).then(Finding::default))?;
        Some(Finding { full, unreached: unreached.unwrap_or_default(), ..finding })
    }

    /// Says what an interface's controller sees of the tasks.
    pub fn set_seen(&self, interface: &str, seen: SeenTasks) {
        let changed = {
            let mut state = self.0.state();
            let known = state.seen.entry(interface.to_owned()).or_default();
            let changed = *known != seen;
            *known = seen;
            changed
        };
        if changed {
            self.0.news.send_modify(|count| *count += 1);
        }
    }

    /// Whether who tells of the cluster heeds what is found: only then it tells which services have checks.
    pub fn set_heeded(&self, heeded: bool) {
        self.0.state().heeded = heeded;
    }

    /// Whether somebody has said which tasks are to be asked, and heeds it.
    pub fn has_begun(&self) -> bool {
        let state = self.0.state();
        state.heeded && !state.begun.is_empty()
    }

    /// Changes whenever something else is found.
    pub fn news(&self) -> watch::Receiver<u64> {
        self.0.news.subscribe()
    }
}

/// Asks a task again and again.
async fn run(shared: Arc<Shared>, task: String, asked: Asked, mut finding: Finding) {
    let Asked { at, check, backs_off } = &asked;
    if at.is_empty() {
        return;
    }
    let (begun, mut streak, mut doubled) = (Instant::now(), 0, 0);
    loop {
        let mut answer = Ok(());
        for at in at {
            answer = ask(*at, check).await.map_err(|what| Finding::why(*at, &what));
            if answer.is_ok() {
                break;
            }
        }
        finding = after(finding, check, answer, &mut streak);
        if !shared.keep(&task, &asked, &finding) {
            return;
        }
        let eager = finding.passes.is_none() && begun.elapsed() < EAGER_FOR;
        let interval = Duration::from_millis(check.interval.into()) * (1 << doubled);
        doubled = if *backs_off && finding.passes == Some(false) { (doubled + 1).min(DOUBLED) } else { 0 };
        tokio::time::sleep(if eager { EAGER.min(interval) } else { interval }).await;
    }
}

/// What is known after an answer; `streak` counts those in a row that speak against what was known.
fn after(known: Finding, check: &Check, answer: Result<(), String>, streak: &mut u16) -> Finding {
    let why = answer.as_ref().err().cloned().unwrap_or_default();
    let right = answer.is_ok();
    let Some(passes) = known.passes else {
        return Finding { passes: right.then_some(true), why, ..Finding::default() };
    };
    if right == passes {
        *streak = 0;
        // Of one that fails the last reason stands; one that passes has none.
        let why = if right { String::new() } else { why };
        return Finding { passes: known.passes, why, ..Finding::default() };
    }
    *streak += 1;
    let enough = if right { check.rise } else { check.fall };
    if *streak < enough {
        return known;
    }
    *streak = 0;
    Finding { passes: Some(right), why, ..Finding::default() }
}

async fn ask(at: SocketAddr, check: &Check) -> Result<(), String> {
    let asked = async {
        let stream = TcpStream::connect(at).await.map_err(|error| words(&error))?;
        match check.kind {
            CheckKind::Tcp => Ok(()),
            CheckKind::Http => get(stream, at, &check.path).await,
        }
    };
    let late = |_| format!("no answer within {} s", PATIENCE.as_secs());
    tokio::time::timeout(PATIENCE, asked).await.map_err(late)?
}

/// The kernel's words, without the number.
fn words(error: &std::io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

async fn get(stream: TcpStream, at: SocketAddr, path: &str) -> Result<(), String> {
    let said = |error: hyper::Error| error.to_string();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(said)?;
    let request = Request::get(path)
        .header(header::HOST, at.to_string())
        .header(header::USER_AGENT, "lb-userspace health check")
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    // It ends with the answer's head: nobody reads the rest.
    let mut drives = JoinSet::new();
    drives.spawn(connection);
    let status = sender.send_request(request).await.map_err(said)?.status();
    if (200..400).contains(&status.as_u16()) { Ok(()) } else { Err(format!("HTTP {status}")) }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    fn check(kind: CheckKind) -> Check {
        Check { kind, port: 1, path: "/up".into(), interval: 100, rise: 2, fall: 3 }
    }

    #[test]
    fn a_task_rises_and_falls_after_answers_in_a_row() {
        let (mut finding, mut streak) = (Finding::default(), 0);
        let mut passes = |answers: &str| -> Vec<Option<bool>> {
            let found = answers.chars().map(|answer| {
                let answer = if answer == '+' { Ok(()) } else { Err("no".to_owned()) };
                finding = after(finding.clone(), &check(CheckKind::Tcp), answer, &mut streak);
                finding.passes
            });
            found.collect()
        };
        let (never, yes, no) = (None, Some(true), Some(false));
        // The first right answer is enough, whatever was before.
        assert_eq!(passes("--+"), [never, never, yes]);
        assert_eq!(passes("--+---"), [yes, yes, yes, yes, yes, no]);
        assert_eq!(passes("+-++"), [no, no, no, yes]);
        assert_eq!(passes("--"), [yes, yes]);
        assert_eq!(passes("-"), [no]);
    }

    #[tokio::test]
    async fn servers_are_asked_as_clients_would() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        assert_eq!(ask(at, &check(CheckKind::Tcp)).await, Ok(()));
        let answers = [
            "HTTP/1.1 204 No Content\r\n\r\n",
            "HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n",
            "HTTP/1.1 503 Busy\r\n\r\n",
            "SSH-2.0-x\r\n",
            "",
        ];
        let served = tokio::spawn(async move {
            // The one of TCP.
            let _ = listener.accept().await.unwrap();
            let mut heads = Vec::new();
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut head = [0; 1024];
                let length = stream.read(&mut head).await.unwrap();
                heads.push(String::from_utf8_lossy(&head[..length]).into_owned());
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
            heads
        });
        let http = check(CheckKind::Http);
        assert_eq!(ask(at, &http).await, Ok(()));
        assert_eq!(ask(at, &http).await, Ok(()));
        assert_eq!(ask(at, &http).await, Err("HTTP 503 Service Unavailable".into()));
        assert!(ask(at, &http).await.is_err());
        assert!(ask(at, &http).await.is_err());
        let heads = served.await.unwrap();
        assert!(heads.iter().all(|head| head.starts_with("GET /up HTTP/1.1\r\n")), "{heads:?}");
        assert!(heads[0].contains(&format!("host: {at}\r\n")), "{heads:?}");
        // Nobody listens there any more.
        assert_eq!(ask(at, &http).await, Err("Connection refused".into()));
    }

    #[tokio::test]
    async fn tasks_are_asked_while_somebody_wants_it() {
        let checks = Checks::default();
        let mut news = checks.news();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = vec![listener.local_addr().unwrap()];
        let asked =
            |at: &[SocketAddr]| Asked { at: at.to_vec(), check: check(CheckKind::Tcp), backs_off: false };
        let wanted = |names: &[&str]| names.iter().map(|name| ((*name).to_owned(), asked(&at))).collect();
        assert!(!checks.has_begun() && checks.finding("old").is_none());
        checks.follow("eth1", wanted(&["old"]), |_| Some(false));
        assert!(!checks.has_begun(), "nobody heeds it");
        checks.set_heeded(true);
        assert!(checks.has_begun());
        // What a former agent said of it stands until it has passed twice.
        assert_eq!(checks.finding("old").map(|finding| finding.passes), Some(Some(false)));
        checks.follow("eth1", wanted(&["old", "new"]), |_| None);
        assert_eq!(checks.finding("new").map(|finding| finding.passes), Some(None));
        let passes = |name: &str| checks.finding(name).is_some_and(|finding| finding.passes == Some(true));
        let all = async {
            while !(passes("old") && passes("new")) {
                news.changed().await.unwrap();
            }
        };
        tokio::time::timeout(Duration::from_secs(30), all).await.expect("both pass");
        // Another interface's controller wants one of them too, and then it alone does.
        checks.follow("eth2", wanted(&["old"]), |_| None);
        checks.follow("eth1", BTreeMap::new(), |_| None);
        assert!(checks.finding("new").is_none() && passes("old"));
        // Nothing is known of where it is by now: what was found stands.
        checks.follow("eth2", BTreeMap::from([("old".to_owned(), asked(&[]))]), |_| None);
        assert!(passes("old"));
        checks.follow("eth2", BTreeMap::new(), |_| None);
        assert!(checks.finding("old").is_none());
    }
}
