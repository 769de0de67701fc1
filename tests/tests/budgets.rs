//! What the programs and tables may cost. A change that needs more raises the number here, and says why.

use std::collections::BTreeMap;

use lb_common::abi::{program, table};
use lb_tests::{
    agent::{Agent, json},
    cluster::Cluster,
    kernel::{COUNTED_MEMORY, version},
    lab::with_lab,
    stack,
};

/// The programs whose figures these are.
const PROGRAMS: [&str; 7] = [
    program::UPLINK_XDP,
    program::UPLINK_TC,
    program::UPLINK_EGRESS,
    program::PEER_TC,
    program::TASK_TC,
    program::TASK_EGRESS,
    program::GC,
];

/// Instructions the verifier walks through, by kernel: each walks other ways. One that is not listed is bounded as the
/// worst that is. What looks at frames beside the uplink walks with and without a link header.
const VERIFIED: [((u32, u32), [u32; 7]); 3] = [
    ((6, 1), [338_000, 487_000, 66_000, 245_000, 228_000, 83_000, 182_000]),
    ((6, 12), [305_000, 375_000, 31_000, 190_000, 102_000, 47_000, 135_000]),
    ((6, 18), [310_000, 397_000, 31_000, 200_000, 110_000, 92_000, 135_000]),
];

/// What no program may be above on any kernel: half of what a kernel walks through.
const MOST_VERIFIED: u32 = 500_000;

/// Bytes of the translated programs, nearly the same everywhere. What is given anew looks for its pair at each try, and asks who may
/// connect; three programs of TC cut datagrams.
const BYTES: [u32; 7] = [224_000, 257_000, 11_000, 129_000, 100_000, 42_000, 3_400];

/// Bytes of the stack that the frames of a chain of calls may take together: the kernel's 512 (`MAX_BPF_STACK`), of which 64 stay
/// free for what is built next.
const STACK: u32 = 512 - 64;

/// How far a figure may grow before somebody must look.
const SLACK_PERCENT: u32 = 10;

#[test]
fn programs_stay_within_their_budgets() {
    let worst =
        std::array::from_fn(|i| VERIFIED.iter().map(|(_, figures)| figures[i]).max().unwrap_or_default());
    let listed = VERIFIED.iter().find(|(kernel, _)| *kernel == version());
    let verified = listed.map_or(worst, |(_, figures)| *figures);
    with_lab(vec![], |lab| {
        let needed = lab.datapath().programs().expect("facts");
        for name in [program::PEER_TC, program::TASK_EGRESS] {
            assert!(needed.iter().all(|program| program.name != name), "nobody needs it yet");
            lab.demand(name);
        }
        let facts = lab.datapath().programs().expect("facts");
        let object = std::env::var_os("LB_OBJECT").expect("LB_OBJECT names the object");
        let stacks = stack::frames(&std::fs::read(object).expect("the object"));
        let (major, minor) = version();
        println!("Linux {major}.{minor}: {facts:#?}\nbytes of stack: {stacks:?}");
        for (index, name) in PROGRAMS.iter().enumerate() {
            let program = facts.iter().find(|program| program.name == *name).expect("the program");
            let within = |figure: u32, budget: u32| figure <= budget + budget * SLACK_PERCENT / 100;
            let (instructions, bytes) = (verified[index], BYTES[index]);
            assert!(
                within(program.verified_instructions, instructions),
                "{program:?}: verified {instructions} before"
            );
            assert!(program.verified_instructions <= MOST_VERIFIED, "{program:?}");
            assert!(within(program.translated_bytes, bytes), "{program:?}: {bytes} bytes before");
            let frames = &stacks[*name];
            assert!(frames.iter().sum::<u32>() <= STACK, "{name}: {frames:?} bytes of stack");
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
    assert!(per_cpu / cpus <= 9 << 19, "{per_cpu} bytes of counters on {cpus} CPUs");
    let rest: u64 = tables.values().sum::<u64>() - per_cpu;
    // Older kernels count tables that grow on demand as if they were full; five are the ranges of who may connect.
    let most = if version() >= COUNTED_MEMORY { 120 } else { 160 };
    assert!(rest <= most << 20, "{rest} bytes of tables");
    let connections = tables[table::CONNECTIONS4] + tables[table::CONNECTIONS6];
    assert!(connections <= 97 << 20, "{connections} bytes of connections");
}
