//! What `top` draws on the smallest of terminals, and what keys do.

use std::time::{Duration, Instant};

use ratatui::{
    Terminal,
    backend::TestBackend,
    crossterm::event::{KeyCode, KeyEvent, KeyModifiers},
};

use super::{Model, Pane, Seen, draw, press};
use crate::inventory::{Agent, Node, Service, Task};

fn seen(at: Instant, rounds: u64) -> Seen {
    let service = |name: &str, connections, problem: Option<&str>| Service {
        name: name.into(),
        active_tasks: 2,
        tasks: 3,
        ports: vec!["*:80->8080/tcp".into()],
        left_to_swarm: None,
        connections,
        refused_connections: 0,
        denied_packets: 0,
        failovers: if problem.is_some() { rounds * 4 } else { 0 },
        problem: problem.map(str::to_owned),
    };
    let task = |service: &str, number: u64, problem: Option<&str>| Task {
        name: format!("{service}.{number}"),
        service: service.into(),
        node: format!("node{number}"),
        state: "running".into(),
        via: "local",
        addresses: vec!["172.18.0.3:8080".into()],
        active: problem.is_none(),
        share: 50,
        connections: rounds * 10 * number,
        open_connections: Some(number),
        failovers: if problem.is_some() { rounds * 4 } else { 0 },
        request_packets: 0,
        request_bytes: rounds * 1_000,
        reply_packets: 0,
        reply_bytes: rounds * 2_000_000,
        problem: problem.map(str::to_owned),
    };
    let node = |name: &str, this: bool, agent, problem: Option<&str>| Node {
        name: name.into(),
        id: name.into(),
        addresses: vec!["192.0.2.1".parse().unwrap()],
        reached_by: (!this).then(|| "eth1".into()),
        this,
        agent,
        key: None,
        forged_packets: 0,
        tasks: 2,
        zone: String::new(),
        problem: problem.map(str::to_owned),
    };
    let silent = "the datapath at 192.0.2.3 has fallen silent";
    Seen {
        at,
        interface: "eth1".into(),
        title: "DEGRADED  native XDP  process 22301".into(),
        problems: vec![format!("node node3: {silent}")],
        services: vec![
            service("api", rounds * 40, None),
            service("web", rounds * 412, Some("1 of 3 tasks refuse or do not answer")),
        ],
        tasks: vec![
            task("api", 1, None),
            task("web", 1, None),
            task("web", 2, Some("refuses or does not answer")),
        ],
        nodes: vec![
            node("node1", true, Agent::Yes, None),
            node("node2", false, Agent::Yes, None),
            node("node3", false, Agent::Silent, Some(silent)),
        ],
        outcomes: vec![
            ("forwarded_local".into(), rounds * 8_000, false),
            ("task_refused".into(), rounds * 4, true),
            ("not_ours".into(), 12, false),
        ],
    }
}

fn model() -> Model {
    let start = Instant::now();
    let mut model = Model::new(seen(start, 1));
    for round in 2..=6 {
        model.take(seen(start + Duration::from_secs(round - 1), round));
    }
    model
}

fn picture(model: &Model) -> String {
    let mut terminal = Terminal::new(TestBackend::new(80, 24)).unwrap();
    terminal.draw(|frame| draw(frame, model)).unwrap();
    terminal.backend().to_string()
}

fn type_keys(model: &mut Model, keys: &str) {
    for letter in keys.chars() {
        let code = match letter {
            '\n' => KeyCode::Enter,
            '\x1b' => KeyCode::Esc,
            '\t' => KeyCode::Tab,
            letter => KeyCode::Char(letter),
        };
        assert!(press(model, KeyEvent::new(code, KeyModifiers::NONE)), "{letter:?}");
    }
}

#[test]
fn every_pane_fits_the_smallest_terminal() {
    let mut model = model();
    insta::assert_snapshot!("top-services", picture(&model));
    type_keys(&mut model, "\n");
    assert_eq!((model.pane, model.service.as_deref()), (Pane::Tasks, Some("web")));
    insta::assert_snapshot!("top-tasks-of-web", picture(&model));
    type_keys(&mut model, "3");
    insta::assert_snapshot!("top-nodes", picture(&model));
    type_keys(&mut model, "4");
    insta::assert_snapshot!("top-outcomes", picture(&model));
    type_keys(&mut model, "1?");
    insta::assert_snapshot!("top-keys", picture(&model));
}

#[test]
fn rows_are_sorted_filtered_and_walked_through() {
    let mut model = model();
    let names = |model: &Model| model.services().iter().map(|s| s.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&model), ["web", "api"]);
    assert!((model.of_service("web").new - 412.0).abs() < 0.1);
    assert!((model.of_task("web.2").failovers - 4.0).abs() < 0.1);
    type_keys(&mut model, "r");
    assert_eq!(names(&model), ["api", "web"]);
    type_keys(&mut model, "rsss");
    assert_eq!(names(&model), ["api", "web"]);
    type_keys(&mut model, "/we\n");
    assert_eq!(names(&model), ["web"]);
    type_keys(&mut model, "\x1b");
    assert_eq!(names(&model), ["api", "web"]);
    type_keys(&mut model, "jjjj");
    assert_eq!(model.selected, 1);
    type_keys(&mut model, "\n");
    assert_eq!(model.service.as_deref(), Some("web"));
    type_keys(&mut model, "\x1b\t\t");
    assert_eq!((model.pane, model.service.as_deref()), (Pane::Nodes, None));
    assert!(!press(&mut model, KeyEvent::new(KeyCode::Char('q'), KeyModifiers::NONE)));
    assert!(!press(&mut model, KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)));
}
