//! What tasks are to do by what checks of our own found of them.

use crate::{
    check::Finding,
    cluster::{Task, TaskState},
};

/// What becomes of a task by what was found of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Judged {
    /// What it is to do.
    pub(super) state: TaskState,
    /// Why it should take new connections and does not, or does so all the same.
    pub(super) problem: Option<String>,
}

/// What the tasks of a service are to do, one for each: of those that run, one that fails drains, and one that has never passed has
/// not started. Where nobody would be left of those that are `usable`, all of them run as if there were no check: a client is
/// refused by nobody who could serve him.
pub(super) fn judge(tasks: &[Task], usable: impl Fn(&Task) -> bool) -> Vec<Judged> {
    let by_itself = |task: &Task| {
        let finding = task.finding.as_ref().filter(|_| task.state == TaskState::Running);
        let why = |finding: &Finding| {
            if finding.why.is_empty() { String::new() } else { format!(": {}", finding.why) }
        };
        let (state, problem) = match finding {
            Some(finding) if finding.passes == Some(false) => {
                (TaskState::Draining, format!("fails its health check{}", why(finding)))
            }
            Some(finding) if finding.passes.is_none() => {
                (TaskState::Starting, format!("has not passed its health check yet{}", why(finding)))
            }
            _ => return Judged { state: task.state, problem: None },
        };
        Judged { state, problem: Some(problem) }
    };
    let mut judged: Vec<Judged> = tasks.iter().map(by_itself).collect();
    let all = || tasks.iter().zip(&judged);
    let is_left = |(task, judged): (&Task, &Judged)| judged.state == TaskState::Running && usable(task);
    if all().any(|(_, judged)| judged.problem.is_some()) && !all().any(is_left) {
        for judged in &mut judged {
            if let Some(problem) = &mut judged.problem {
                judged.state = TaskState::Running;
                *problem += "; offered all the same, for no task passes";
            }
        }
    }
    judged
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Via;

    fn tasks(states: &[TaskState], findings: &[Option<Option<bool>>]) -> Vec<Task> {
        let task = |(index, (state, passes)): (usize, (&TaskState, &Option<Option<bool>>))| Task {
            name: format!("web.{index}"),
            node: "node1".into(),
            addresses: vec![],
            overlay: None,
            state: *state,
            weight: 1,
            via: Via::Peer,
            finding: passes.map(|passes| Finding { passes, why: String::new() }),
        };
        states.iter().zip(findings).enumerate().map(task).collect()
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
            let judged = judge(&tasks(&states, &findings), |_| true);
            let found: Vec<TaskState> = judged.into_iter().map(|judged| judged.state).collect();
            assert_eq!(found, wanted, "{states:?} {findings:?}");
        }
        // One that passes and cannot be reached serves nobody.
        let tasks = tasks(&[Running; 3], &[passes, fails, new]);
        let judged = judge(&tasks, |task| task.name != "web.0");
        assert!(judged.iter().all(|judged| judged.state == Running), "{judged:?}");
    }

    #[test]
    fn why_is_said() {
        let mut tasks = tasks(&[TaskState::Running; 2], &[Some(Some(true)), None]);
        let why = "172.18.0.3:8080: Connection refused".to_owned();
        tasks[1].finding = Some(Finding { passes: None, why });
        let said = "has not passed its health check yet: 172.18.0.3:8080: Connection refused";
        let problems = |usable| -> Vec<Option<String>> {
            judge(&tasks, |_| usable).into_iter().map(|judged| judged.problem).collect()
        };
        assert_eq!(problems(true), [None, Some(said.to_owned())]);
        let all_the_same = format!("{said}; offered all the same, for no task passes");
        assert_eq!(problems(false), [None, Some(all_the_same)]);
    }
}
