//! What operators meet: what is said when things go wrong, what is shown, what is measured, and that each is true.

use std::{
    fs,
    io::Write as _,
    net::{IpAddr, TcpStream},
    os::unix::{net::UnixStream, process::ExitStatusExt as _},
    path::Path,
    process::{Output, Stdio},
    time::Duration,
};

use lb_tests::{
    agent::{Agent, json, program, text, verb},
    cluster::Cluster,
    netns::{Netns, Running, eventually, within},
    traffic::requests,
};
use nix::sys::signal::{Signal, kill};
use serde_json::Value;

/// Two nodes; three tasks on the first.
fn three_tasks() -> Cluster {
    let mut cluster = Cluster::new(2);
    for name in ["web.1", "web.2", "web.3"] {
        cluster.add_nginx(name, 0);
    }
    cluster
}

fn attach<'a>(cluster: &'a Cluster, arguments: &[&str]) -> Agent<'a> {
    Agent::attach(&cluster.nodes[0].netns, cluster.folder(), &cluster.write_all_running(), arguments)
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// A shell's line in a namespace, with the agent as `$LB`.
fn shell(netns: &Netns, line: &str) -> Output {
    netns.command("bash").args(["-c", line]).env("LB", program()).output().expect("start bash")
}

/// A request over any stream; the answer's head and body.
fn http(stream: impl std::io::Read + std::io::Write, path: &str, host: &str) -> (String, String) {
    try_http(stream, path, host).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn try_http(
    mut stream: impl std::io::Read + std::io::Write,
    path: &str,
    host: &str,
) -> std::io::Result<(String, String)> {
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let Some((head, body)) = answer.split_once("\r\n\r\n") else {
        return Err(std::io::Error::other(format!("no whole answer: {answer:?}")));
    };
    let body = if head.to_lowercase().contains("transfer-encoding: chunked") {
        unchunk(body)
    } else {
        body.to_owned()
    };
    Ok((head.to_owned(), body))
}

fn unchunk(mut rest: &str) -> String {
    let mut body = String::new();
    while let Some((length, after)) = rest.split_once("\r\n") {
        let length = usize::from_str_radix(length, 16).expect("a length");
        body += &after[..length];
        rest = &after[(length + 2).min(after.len())..];
    }
    body
}

fn get(netns: &Netns, path: &str) -> (String, String) {
    netns.enter(|| http(TcpStream::connect("127.0.0.1:9464").expect("the agent listens"), path, "localhost"))
}

/// The value of a sample whose line begins so.
fn sample(metrics: &str, begins: &str) -> f64 {
    let line = metrics.lines().find(|line| line.starts_with(begins));
    let line = line.unwrap_or_else(|| panic!("a sample {begins} in:\n{metrics}"));
    line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
}

#[test]
fn who_may_not_look_is_told_so_and_a_start_is_no_damage() {
    let cluster = three_tasks();
    let node = &cluster.nodes[0].netns;
    let agent = attach(&cluster, &[]);
    for arguments in ["status", "service ls", "stats", "node ls", "metrics --once"] {
        let output =
            shell(node, &format!("setpriv --reuid=65534 --regid=65534 --clear-groups $LB {arguments}"));
        let said = said(&output);
        assert_eq!(output.status.code(), Some(1), "{arguments}: {said}");
        assert!(said.contains("Permission denied") && said.contains("needs root"), "{arguments}: {said}");
    }
    // Root without a capability is told which one.
    let agents_end = agent.pid();
    drop(agent);
    assert!(kill(nix::unistd::Pid::from_raw(agents_end), None).is_err(), "it ended");
    let path = cluster.folder().join("cluster.toml");
    let output = shell(
        node,
        &format!(
            "setpriv --bounding-set=-perfmon,-sys_admin --inh-caps=-all $LB attach --iface eth1 --cluster {}",
            path.display()
        ),
    );
    let text = said(&output);
    assert!(text.contains("CAP_PERFMON is missing") && !text.contains("pointer arithmetic"), "{text}");
    // Tables that are being made: somebody holds them, and they have no version yet.
    node.enter(|| {
        let pins = lb_userspace::datapath::PinDir::of("eth1").expect("the pins");
        fs::create_dir_all(pins.path()).expect("make the folder");
        let _lock = pins.lock().expect("the lock");
        let output = verb(node, &["status"]);
        let text = said(&output);
        assert_eq!(output.status.code(), Some(3), "{text}");
        assert!(
            text.contains(&format!("attach is starting on eth1 (process {})", std::process::id())),
            "{text}"
        );
        fs::remove_dir(pins.path()).expect("remove the folder");
    });
}

#[test]
fn output_that_nobody_takes_is_no_panic() {
    let cluster = three_tasks();
    let node = &cluster.nodes[0].netns;
    let _agent = attach(&cluster, &[]);
    let mut child = node
        .command(program())
        .args(["stats", "--watch"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start the agent");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("its end");
    assert_eq!(output.status.signal(), Some(Signal::SIGPIPE as i32), "{}", said(&output));
    assert_eq!(said(&output), "");
    let output = shell(node, "$LB stats > /dev/full");
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("write to standard output: No space left on device"), "{}", said(&output));
}

#[test]
fn a_hangup_reloads_and_a_wrong_level_is_said() {
    let cluster = three_tasks();
    let node = &cluster.nodes[0].netns;
    let mut agent = attach(&cluster, &[]);
    kill(nix::unistd::Pid::from_raw(agent.pid()), Signal::SIGHUP).expect("send SIGHUP");
    eventually("it is said", || agent.log().contains("as SIGHUP asks"));
    assert!(agent.is_running());
    // The level changes while it runs.
    let written = fs::read_to_string(cluster.folder().join("cluster.toml")).expect("the file");
    let rename = |to: &str| {
        cluster.write(
            &written
                .replace("[[service.task]]\nname = \"web.3\"", &format!("[[service.task]]\nname = \"{to}\"")),
        );
        eventually("it is served", || text(node, &["service", "ps", "web"]).contains(to));
    };
    let applied = |agent: &Agent<'_>| agent.log().matches("applied ").count();
    text(node, &["log-level", "warn"]);
    eventually("it is said", || agent.log().contains("warn is logged from now on"));
    let before = applied(&agent);
    rename("web.8");
    assert_eq!(applied(&agent), before, "a change is no warning");
    text(node, &["log-level", "debug"]);
    eventually("it is said", || agent.log().contains("debug is logged from now on"));
    rename("web.9");
    eventually("a change is told in full again", || applied(&agent) > before);
    drop(agent);
    let output = shell(
        node,
        &format!(
            "RUST_LOG=warning $LB attach --iface eth7 --cluster {}/cluster.toml",
            cluster.folder().display()
        ),
    );
    assert!(said(&output).contains("RUST_LOG=\"warning\" is not a level"), "{}", said(&output));
    assert!(said(&output).contains("there is no interface eth7"), "{}", said(&output));
}

#[test]
fn a_task_that_refuses_is_named_everywhere_and_so_is_its_recovery() {
    let mut cluster = three_tasks();
    cluster.add_task("web.4", 0);
    let node = &cluster.nodes[0].netns;
    let agent = attach(&cluster, &[]);
    let address: IpAddr = cluster.nodes[0].v4().into();
    requests(&cluster.client, address, 8);
    let task = |name: &str| -> Value {
        let tasks = json(node, &["service", "ps", "web"])["tasks"].as_array().cloned().unwrap_or_default();
        tasks.into_iter().find(|task| task["name"] == name).unwrap_or_default()
    };
    eventually("its problem is shown", || {
        task("web.4")["problem"]
            .as_str()
            .is_some_and(|problem| problem.contains("refuses or does not answer"))
    });
    assert!(task("web.1")["problem"].is_null());
    let service = json(node, &["service", "ls"])["services"][0].clone();
    assert!(service["problem"].as_str().is_some_and(|p| p.contains("1 of 4 tasks refuse")), "{service}");
    assert!(service["failovers"].as_u64() > Some(0), "{service}");
    assert_eq!(service["refused_connections"], 0);
    let metrics = get(node, "/metrics").1;
    assert!(
        sample(&metrics, "lb_task_failovers_total{interface=\"eth1\",service=\"web\",task=\"web.4\"") > 0.0
    );
    assert_eq!(sample(&metrics, "lb_task_refusing{interface=\"eth1\",service=\"web\",task=\"web.4\""), 1.0);
    assert_eq!(sample(&metrics, "lb_task_refusing{interface=\"eth1\",service=\"web\",task=\"web.1\""), 0.0);
    let events = text(node, &["events", "--filter", "kind=task_refusing"]);
    assert!(events.contains("task web.4 on node1 refuses connections to port 8080"), "{events}");
    let refusals = || agent.log().matches("task web.4 on node1 refuses").count();
    assert_eq!(refusals(), 1, "{}", agent.log());
    let output = verb(node, &["status"]);
    assert_eq!(output.status.code(), Some(5), "{}", said(&output));
    assert!(
        said(&output).contains("DEGRADED") && said(&output).contains("1 of 4 tasks refuse"),
        "{}",
        said(&output)
    );
    assert_eq!(refusals(), 1, "once");
}

#[test]
fn what_is_listed_can_be_chosen_shaped_and_inspected() {
    let mut cluster = three_tasks();
    cluster.add_nginx("web.4", 1);
    cluster.reach.peers = true;
    let _agent = attach(&cluster, &[]);
    let node = &cluster.nodes[0].netns;
    eventually("the other node is silent", || {
        text(node, &["node", "ls", "--filter", "agent=silent", "-q"]) == "node2\n"
    });
    assert_eq!(text(node, &["service", "ls", "-q"]), "web\n");
    assert_eq!(
        text(node, &["service", "ls", "--format", "{{.Name}} {{.ActiveTasks}}/{{.Tasks}}"]),
        "web 3/4\n"
    );
    assert_eq!(text(node, &["task", "ls", "-q", "--filter", "node=node2"]), "web.4\n");
    assert_eq!(text(node, &["task", "ls", "-q", "--filter", "problem"]), "web.4\n");
    assert_eq!(
        text(node, &["service", "ps", "web", "-q", "--filter", "active=true"]),
        "web.1\nweb.2\nweb.3\n"
    );
    let output = verb(node, &["task", "ls", "--filter", "nod=x"]);
    assert!(
        said(&output).contains("there is no field \"nod\"; those there are: active, addresses"),
        "{}",
        said(&output)
    );
    let inspected = json(node, &["service", "inspect", "web"]);
    assert_eq!(inspected["settings"]["timers"]["established"], 7_440);
    assert_eq!(inspected["tasks"].as_array().map(Vec::len), Some(4));
    assert_eq!(json(node, &["task", "inspect", "web.2"])["ports"].as_array().map(Vec::len), Some(2));
    assert_eq!(json(node, &["node", "inspect", "node2"])["agent"], "silent");
    let output = verb(node, &["service", "inspect", "wbe"]);
    assert!(said(&output).contains("there is no service wbe; did you mean web?"), "{}", said(&output));
    // Documents of one line each, for as long as somebody reads.
    let output = shell(node, "$LB service ls --watch -o json | head -n 2");
    let lines: Vec<Value> =
        said(&output).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0]["interfaces"][0]["services"][0]["name"], "web");
}

#[test]
fn what_is_drained_by_hand_gets_nothing_new_and_stays_so() {
    let cluster = three_tasks();
    let node = &cluster.nodes[0].netns;
    let address: IpAddr = cluster.nodes[0].v4().into();
    let agent = attach(&cluster, &[]);
    let answers = |count| {
        let mut names: Vec<String> = requests(&cluster.client, address, count)
            .iter()
            .map(|answer| answer.split(' ').next().unwrap_or_default().to_owned())
            .collect();
        names.sort();
        names.dedup();
        names
    };
    assert_eq!(answers(6), ["web.1", "web.2", "web.3"]);
    let output = verb(node, &["task", "drain", "web.22"]);
    assert!(said(&output).contains("there is no task web.22; did you mean web.2?"), "{}", said(&output));
    let drained = text(node, &["task", "drain", "web.2", "--wait=20s"]);
    assert_eq!(drained, "drained: no connection is open to web.2\n");
    assert_eq!(answers(6), ["web.1", "web.3"]);
    let state = || json(node, &["task", "inspect", "web.2"])["state"].clone();
    assert_eq!(state(), "drained");
    assert!(text(node, &["status"]).contains("drained     task web.2"));
    let metrics = get(node, "/metrics").1;
    assert_eq!(sample(&metrics, "lb_tasks{interface=\"eth1\",service=\"web\",state=\"drained\"}"), 1.0);
    assert!(text(node, &["events"]).contains("task web.2 is drained by hand"));
    // A new controller, and a new state of the source, change nothing.
    agent.stop(Signal::SIGTERM);
    let agent = attach(&cluster, &[]);
    assert_eq!(answers(6), ["web.1", "web.3"]);
    assert_eq!(get(node, "/-/ready").1, "ready\n");
    // Nothing new comes to a node that is drained; what asks whether it is ready is told.
    text(node, &["node", "drain", "node1"]);
    eventually("it is not ready", || get(node, "/-/ready").1.contains("eth1: this node is drained by hand"));
    eventually("no task is offered", || json(node, &["service", "ls"])["services"][0]["active_tasks"] == 0);
    text(node, &["node", "undrain", "node1"]);
    text(node, &["task", "undrain", "web.2"]);
    eventually("all are offered", || json(node, &["service", "ls"])["services"][0]["active_tasks"] == 3);
    assert_eq!(answers(6), ["web.1", "web.2", "web.3"]);
    let output = verb(node, &["task", "undrain", "web.2"]);
    assert!(said(&output).contains("task web.2 is not drained by hand"), "{}", said(&output));
    drop(agent);
}

#[test]
fn events_tell_each_change_once_to_any_shell() {
    let mut cluster = three_tasks();
    cluster.reach.peers = true;
    let (node, other) = (&cluster.nodes[0].netns, &cluster.nodes[1].netns);
    let agent = attach(&cluster, &[]);
    let path = cluster.folder().join("cluster.toml");
    let followed = cluster.folder().join("followed");
    let file = fs::File::create(&followed).expect("create a file");
    let follower =
        Running::start(node.command(program()).args(["events", "--follow", "-o", "json"]).stdout(file));
    let kinds = |task: &str| -> Vec<String> {
        let text = fs::read_to_string(&followed).unwrap_or_default();
        let events = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let its = events.filter(|event| task.is_empty() || event["task"] == task || event["node"] == task);
        its.filter_map(|event| event["kind"].as_str().map(str::to_owned)).collect()
    };
    let second = Agent::attach(other, cluster.folder(), &path, &["--listen", "none"]);
    eventually("node2 is heard", || kinds("node2").last().is_some_and(|kind| kind == "node_heard"));
    second.stop(Signal::SIGKILL);
    assert!(verb(other, &["detach", "--iface", "eth1"]).status.success());
    eventually("node2 falls silent", || kinds("node2").last().is_some_and(|kind| kind == "node_silent"));
    let whole = fs::read_to_string(&path).expect("the file");
    cluster.write(&whole.replacen("state = \"running\"", "state = \"draining\"", 1));
    eventually("web.1 drains", || kinds("web.1") == ["task_draining"]);
    cluster.write(&whole);
    eventually("web.1 is offered", || kinds("web.1") == ["task_draining", "task_offered"]);
    cluster.write(&whole.replace("state = \"running\"", "state = \"draining\""));
    eventually("none is offered", || kinds("").contains(&"service_without_task".to_owned()));
    cluster.write("[[service]]\nname = 1\n");
    eventually("the source is lost", || kinds("").contains(&"source_lost".to_owned()));
    cluster.write(&whole);
    eventually("the source is back", || kinds("").contains(&"source_back".to_owned()));
    eventually("a task is offered", || kinds("").contains(&"service_has_task".to_owned()));
    agent.stop(Signal::SIGTERM);
    eventually("its end is told", || kinds("").last().is_some_and(|kind| kind == "controller_stopped"));
    drop(follower);
    // Without an agent, and each once.
    let said = text(node, &["events", "--filter", "kind=source_lost"]);
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("eth1 source_lost the source failed, the last state stands: "), "{said}");
    assert_eq!(text(node, &["events", "-n", "1"]).lines().count(), 1);
    assert!(verb(node, &["detach", "--iface", "eth1"]).status.success());
}

#[test]
fn metrics_are_well_formed_and_a_real_prometheus_takes_them() {
    let cluster = three_tasks();
    let node = &cluster.nodes[0].netns;
    let socket = cluster.folder().join("lb.sock");
    let unix = format!("unix:{}", socket.display());
    let agent = attach(&cluster, &["--listen", "127.0.0.1:9464", "--listen", &unix]);
    requests(&cluster.client, cluster.nodes[0].v4().into(), 6);
    let (head, metrics) = get(node, "/metrics");
    assert!(head.contains("application/openmetrics-text"), "{head}");
    assert_eq!(sample(&metrics, "lb_connections_total{interface=\"eth1\",service=\"web\"}"), 6.0);
    assert_eq!(sample(&metrics, "lb_serving{interface=\"eth1\"}"), 1.0);
    assert!(metrics.ends_with("# EOF\n"));
    let (head, over_unix) = http(UnixStream::connect(&socket).expect("the socket"), "/metrics", "localhost");
    assert!(head.starts_with("HTTP/1.1 200") && over_unix.contains("lb_build_info{"), "{head}");
    assert!(
        text(node, &["metrics", "--once"])
            .contains("lb_connections_total{interface=\"eth1\",service=\"web\"} 6")
    );
    assert_eq!(get(node, "/-/healthy").1, "healthy\n");
    assert_eq!(get(node, "/-/ready").1, "ready\n");
    // A page elsewhere whose name leads here is not answered.
    let stranger = node.enter(|| {
        http(TcpStream::connect("127.0.0.1:9464").expect("the agent listens"), "/metrics", "evil.example")
    });
    assert!(stranger.0.starts_with("HTTP/1.1 421"), "{}", stranger.0);
    // promtool reads the older format, which differs in the end alone.
    let checked = lint(&metrics);
    assert!(checked.status.success(), "{}", said(&checked));
    let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/prometheus");
    let config = cluster.folder().join("prometheus.yml");
    let rules = packaging.join("alerts.yml");
    fs::write(
        &config,
        format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: ['{}']\nscrape_configs:\n\
             - job_name: lb\n  static_configs: [{{targets: ['127.0.0.1:9464']}}]\n",
            fs::canonicalize(&rules).expect("the rules").display()
        ),
    )
    .expect("write Prometheus' configuration");
    let _prometheus = Running::start(
        node.command("prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", cluster.folder().join("tsdb").display()))
            .args(["--web.listen-address=127.0.0.1:9090", "--log.level=error"]),
    );
    let ask = |query: &str| -> Value {
        let path = format!("/api/v1/query?query={query}");
        let answer = node.enter(|| {
            let stream = TcpStream::connect("127.0.0.1:9090").ok()?;
            stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
            try_http(stream, &path, "localhost").ok().map(|(_, body)| body)
        });
        answer.and_then(|body| serde_json::from_str(&body).ok()).unwrap_or_default()
    };
    let value = |query: &str| ask(query)["data"]["result"][0]["value"][1].as_str().map(str::to_owned);
    within(Duration::from_secs(60), "Prometheus has scraped", || {
        value("lb_connections_total").as_deref() == Some("6")
    });
    assert_eq!(value("up").as_deref(), Some("1"));
    assert!(value("sum(lb_change_delay_seconds_count)").is_some());
    drop(agent);
}

/// What promtool has to say of metrics.
fn lint(metrics: &str) -> Output {
    let mut child = std::process::Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start promtool");
    let older = older(metrics);
    child.stdin.take().expect("its input").write_all(older.as_bytes()).expect("write to promtool");
    child.wait_with_output().expect("promtool's end")
}

/// The older text format, in which a counter's own lines have its suffix, and units and an end have no lines.
fn older(metrics: &str) -> String {
    let counters: Vec<&str> =
        metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter")).collect();
    let mut text = String::new();
    for line in metrics.lines().filter(|line| !line.starts_with("# UNIT ") && *line != "# EOF") {
        let mut words: Vec<String> = line.splitn(4, ' ').map(str::to_owned).collect();
        if words[0] == "#" && counters.contains(&words[2].as_str()) {
            words[2] += "_total";
        }
        text += &(words.join(" ") + "\n");
    }
    text
}

#[test]
fn alert_rules_do_what_they_say() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/prometheus");
    for arguments in [["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]] {
        let output = std::process::Command::new("promtool")
            .args(arguments)
            .current_dir(&folder)
            .output()
            .expect("start promtool");
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
    }
    // Each expression of the dashboard asks for metrics that there are.
    let dashboard: Value = serde_json::from_str(
        &fs::read_to_string(folder.join("../grafana/dashboard.json")).expect("the dashboard"),
    )
    .expect("JSON");
    let source = fs::read_to_string(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../lb-userspace/src/serve/metrics.rs"),
    )
    .expect("the metrics");
    let mut asked = 0;
    for panel in dashboard["panels"].as_array().expect("panels") {
        assert!(panel["title"].is_string() && panel["gridPos"]["w"].is_u64(), "{panel}");
        for target in panel["targets"].as_array().into_iter().flatten() {
            let expression = target["expr"].as_str().expect("an expression");
            let names = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            for name in names.filter(|name| name.starts_with("lb_")) {
                let plain = name.trim_start_matches("lb_");
                let plain =
                    ["_total", "_bucket", "_count", "_sum"].iter().fold(plain, |n, s| n.trim_end_matches(s));
                let plain = plain.trim_end_matches("_seconds").trim_end_matches("_bytes");
                assert!(source.contains(&format!("\"{plain}\"")), "{name} in {expression}");
                asked += 1;
            }
        }
    }
    assert!(asked > 15, "{asked}");
}
