//! Large clusters: what a change costs does not depend on their size.

use std::time::Duration;

use lb_tests::large::{Large, Listeners, Size};
use lb_userspace::datapath::PinDir;

/// Large enough that what is done for each service or task would show.
const SIZE: Size = Size { services: 300, tasks: 3_000 };

#[test]
fn a_change_of_one_task_writes_what_that_task_is_named_in() {
    let large = Large::new(SIZE);
    let _others = large.answer();
    large.write(&SIZE.text(None));
    let agent = large.attach(&large.put(), &[]);
    let listeners = Listeners::open(&large.node.enter(|| PinDir::of("eth1").expect("the pins")));
    listeners.complete(SIZE, Duration::from_secs(60));
    let applied = |log: &str| -> Vec<String> {
        let counts = log.lines().filter_map(|line| line.split_once(": applied ")?.1.split_once(" changes"));
        counts.map(|(count, _)| count.to_owned()).collect()
    };
    let loaded = applied(&agent.log()).len();
    for service in [0, 150, 299] {
        large.change(&listeners, Some(service), service);
        large.change(&listeners, None, service);
    }
    // The service's label, the backend, its slots and the listener; whatever else happens meanwhile.
    let small = || applied(&agent.log())[loaded..].iter().filter(|count| *count == "4").count();
    lb_tests::netns::eventually("six changes of four operations each were applied", || small() == 6);
}
