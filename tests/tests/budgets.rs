//! What the programs and tables may cost. A change that needs more raises the number here, and says why.

use std::collections::BTreeMap;

use lb_common::abi::table;
use lb_tests::{
    agent::{Agent, json},
    cluster::Cluster,
    lab::with_lab,
};

/// Instructions the verifier walks through, and bytes of the translated program, on Linux 6.18.
const PROGRAMS: [(&str, u32, u32); 3] =
    [("uplink_xdp", 161_000, 90_000), ("uplink_tc", 340_000, 114_000), ("task_tc", 95_000, 50_000)];

/// How far a figure may grow before somebody must look: other kernels walk other ways.
const SLACK_PERCENT: u32 = 10;

#[test]
fn programs_stay_within_their_budgets() {
    with_lab(vec![], |lab| {
        let facts = lab.datapath().programs().expect("facts");
        println!("{facts:#?}");
        for (name, instructions, bytes) in PROGRAMS {
            let program = facts.iter().find(|program| program.name == name).expect("the program");
            let within = |figure: u32, budget: u32| figure <= budget + budget * SLACK_PERCENT / 100;
            assert!(
                within(program.verified_instructions, instructions),
                "{program:?}: verified {instructions} before"
            );
            assert!(within(program.translated_bytes, bytes), "{program:?}: {bytes} bytes before");
        }
    });
}

#[test]
fn tables_stay_within_their_memory() {
    let mut cluster = Cluster::new(1);
    let task = cluster.add_task("web.1", 0);
    let path = cluster.write(&cluster.file("\"80:8080\"", &[(&cluster.tasks[task], "running")]));
    let _agent = Agent::attach(&cluster.nodes[0].netns, cluster.folder(), &path, &[]);
    let status = json(&cluster.nodes[0].netns, &["status"]);
    let tables: BTreeMap<String, u64> = status["tables"]
        .as_array()
        .expect("tables")
        .iter()
        .map(|table| {
            (
                table["table"].as_str().expect("a name").to_owned(),
                table["memory_bytes"].as_u64().expect("bytes"),
            )
        })
        .collect();
    println!("{tables:#?}");
    // MiB with the default sizes and two CPUs; the tables that hold counters grow with the CPUs.
    let cpus = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    let per_cpu: u64 =
        [table::BACKEND_STATS, table::SERVICE_STATS, table::OUTCOMES].map(|name| tables[name]).iter().sum();
    assert!(per_cpu / cpus <= 4 << 20, "{per_cpu} bytes of counters on {cpus} CPUs");
    let rest: u64 = tables.values().sum::<u64>() - per_cpu;
    assert!(rest <= 110 << 20, "{rest} bytes of tables");
    let flows = tables[table::FLOWS4] + tables[table::FLOWS6];
    assert!(flows <= 90 << 20, "{flows} bytes of flows");
}
