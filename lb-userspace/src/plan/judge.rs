//! What tasks are to do by what checks of our own found of them.

use crate::{
    check::Finding,
    cluster::{Service, Task, TaskState},
};

/// What becomes of a task by what was found of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Judged {
    /// What it is to do.
    pub(super) state: TaskState,
    /// Why it should take new connections and does not, or does so all the same.
    pub(super) problem: Option<String>,
}

/// What the tasks of a service are to do, one for each: of those that run, one that fails or is full drains, and one that has never
/// passed has not started. Where nobody would be left of those that are `usable`, all of them run as if there were no check: a client is
/// refused by nobody who could serve him.
pub(super) fn judge(service: &Service, usable: impl Fn(&Task) -> bool) -> Vec<Judged> {
    let tasks = &service.tasks;
    let by_itself = |task: &Task| {
        let finding = task.finding.as_ref().filter(|_| task.state == TaskState::Running);
        let why = |finding: &Finding| {
            if finding.why.is_empty() { String::new() } else { format!(": {}", finding.why) }
        };
        let (state, problem) = match finding {
            Some(finding) if finding.passes == Some(false) && service.health.is_some() => {
                (TaskState::Draining, format!("fails its health check{}", why(finding)))
            }
            Some(finding) if finding.passes == Some(false) => {
                (TaskState::Draining, format!("does not take connections{}", why(finding)))
            }
            // Who cannot be reached from here either says so by itself.
            Some(finding) if !finding.unreached.is_empty() && usable(task) => {
                (TaskState::Draining, format!("its own node has no way to it: {}", finding.unreached))
            }
            Some(finding) if finding.full => {
                let most = service.task_max_connections;
                (TaskState::Draining, format!("has {most} connections, as many as it may have"))
            }
            Some(finding) if finding.passes.is_none() && service.health.is_some() => {
                (TaskState::Starting, format!("has not passed its health check yet{}", why(finding)))
            }
            _ => return Judged { state: task.state, problem: None },
        };
        Judged { state, problem: Some(problem) }
    };
    let mut judged: Vec<Judged> = tasks.iter().map(by_itself).collect();
    let is_left = |(task, judged): (&Task, &Judged)| judged.state == TaskState::Running && usable(task);
    // First those who are only full: whom they have no room for is told so, and no task that fails gets what they cannot take.
    for (what, reason) in [
        (Finding::is_only_full as fn(&Finding, bool) -> bool, "all are full"),
        (|_, _| true, "no task passes"),
    ] {
        let anybody = judged.iter().any(|judged| judged.problem.is_some());
        if !anybody || tasks.iter().zip(&judged).any(is_left) {
            break;
        }
        let asks = service.health.is_some();
        let them = tasks.iter().map(|task| task.finding.as_ref().is_some_and(|finding| what(finding, asks)));
        for (judged, them) in judged.iter_mut().zip(them) {
            if let Some(problem) =
                judged.problem.as_mut().filter(|_| them && judged.state != TaskState::Running)
            {
                judged.state = TaskState::Running;
                *problem += &format!("; offered all the same, for {reason}");
            }
        }
    }
    judged
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{check::CheckSpec, cluster::Via};

    fn service(states: &[TaskState], findings: &[Option<Option<bool>>]) -> Service {
        let task = |(index, (state, passes)): (usize, (&TaskState, &Option<Option<bool>>))| Task {
            name: format!("web.{index}"),
            node: "node1".into(),
            addresses: vec![],
            overlay: None,
            state: *state,
            weight: 1,
            via: Via::Peer,
            finding: passes.map(|passes| Finding { passes, ..Finding::default() }),
        };
        let tasks = states.iter().zip(findings).enumerate().map(task).collect();
        let health = CheckSpec { kind: "tcp".into(), ..CheckSpec::default() }.check(Some(80)).unwrap();
        Service { tasks, health, ..Service::default() }
    }

    #[test]
    fn who_does_not_pass_gets_no_new_connections_unless_nobody_does() {
        use TaskState::{Draining, Running, Starting};
        let (passes, fails, new, unknown) = (Some(Some(true)), Some(Some(false)), Some(None), None);
        for (states, findings, wanted) in [
            (vec![Running; 3], vec![passes, fails, new], vec![Running, Draining, Starting]),
            // Another node's agent tells nothing of its tasks: it may be older.
            (vec![Running; 2], vec![unknown, fails], vec![Running, Draining]),
            (vec![Running; 2], vec![new, fails], vec![Running, Running]),
            (vec![Running], vec![new], vec![Running]),
            // Those that Docker is ending, or starting, are not called back.
            (vec![Draining, Running], vec![passes, new], vec![Draining, Running]),
            (vec![Starting, Running], vec![passes, fails], vec![Starting, Running]),
            (vec![Draining, Starting], vec![fails, new], vec![Draining, Starting]),
            (vec![], vec![], vec![]),
        ] {
            let judged = judge(&service(&states, &findings), |_| true);
            let found: Vec<TaskState> = judged.into_iter().map(|judged| judged.state).collect();
            assert_eq!(found, wanted, "{states:?} {findings:?}");
        }
        // One that passes and cannot be reached serves nobody.
        let service = service(&[Running; 3], &[passes, fails, new]);
        let judged = judge(&service, |task| task.name != "web.0");
        assert!(judged.iter().all(|judged| judged.state == Running), "{judged:?}");
    }

    #[test]
    fn why_is_said() {
        let mut service = service(&[TaskState::Running; 2], &[Some(Some(true)), None]);
        let why = "172.18.0.3:8080: Connection refused".to_owned();
        service.tasks[1].finding = Some(Finding { why, ..Finding::default() });
        let said = "has not passed its health check yet: 172.18.0.3:8080: Connection refused";
        let problems = |usable| -> Vec<Option<String>> {
            judge(&service, |_| usable).into_iter().map(|judged| judged.problem).collect()
        };
        assert_eq!(problems(true), [None, Some(said.to_owned())]);
        let all_the_same = format!("{said}; offered all the same, for no task passes");
        assert_eq!(problems(false), [None, Some(all_the_same)]);
    }

    #[test]
    fn without_a_check_who_was_found_to_take_none_or_to_be_full_is_left_out() {
        let mut service = service(&[TaskState::Running; 3], &[Some(Some(false)), Some(None), None]);
        service.health = None;
        service.task_max_connections = 7;
        for (task, why, full) in [(0, "172.18.0.3:8080: Connection refused", false), (1, "", true)] {
            let finding = service.tasks[task].finding.as_mut().unwrap();
            (finding.why, finding.full) = (why.to_owned(), full);
        }
        let said: Vec<_> =
            judge(&service, |_| true).into_iter().map(|judged| (judged.state, judged.problem)).collect();
        let refuses = "does not take connections: 172.18.0.3:8080: Connection refused".to_owned();
        let full = "has 7 connections, as many as it may have".to_owned();
        let draining = TaskState::Draining;
        assert_eq!(said, [(draining, Some(refuses)), (draining, Some(full)), (TaskState::Running, None)]);
        // Where nobody else is left, those who are only full are offered, and those who take none only where there is no other.
        service.tasks.pop();
        let states = |service: &Service| -> Vec<TaskState> {
            judge(service, |_| true).into_iter().map(|judged| judged.state).collect()
        };
        assert_eq!(states(&service), [draining, TaskState::Running]);
        service.tasks.pop();
        assert_eq!(states(&service), [TaskState::Running]);
    }

    #[test]
    fn whom_his_own_node_does_not_reach_nobody_is_sent_to() {
        let mut service = service(&[TaskState::Running; 2], &[Some(None), None]);
        service.health = None;
        service.tasks[0].finding.as_mut().unwrap().unreached = "veth1 is down".to_owned();
        let said = |usable: bool| {
            let judged = judge(&service, |task| usable || task.name != "web.0");
            (judged[0].state, judged[0].problem.clone())
        };
        let why = "its own node has no way to it: veth1 is down".to_owned();
        assert_eq!(said(true), (TaskState::Draining, Some(why)));
        // Its node itself, and whoever does not reach it either, has a word of his own.
        assert_eq!(said(false), (TaskState::Running, None));
    }
}
