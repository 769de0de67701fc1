//! The page that the agent serves, in a real browser: what it says, that it fits a phone and a desk, that it can be read and
//! worked by keyboard, and that nothing of it comes from elsewhere.

use std::{fs, net::IpAddr, path::PathBuf, time::Duration};

use lb_tests::{
    agent::Agent,
    browser::Browser,
    cluster::Cluster,
    netns::{Netns, within},
    traffic::{Load, requests},
};

const URL: &str = "http://127.0.0.1:9464/";
/// Where pictures are put, for people to look at; nowhere unless it is set.
const PICTURES: &str = "LB_PICTURES";

/// The least contrast of text against what is behind it, over all that is shown (WCAG 2, relative luminance).
const CONTRAST: &str = r#"(() => {
    const channel = (c) => { c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
    const parse = (text) => (text.match(/[\d.]+/g) || []).map(Number);
    const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const behind = (node) => {
        for (let at = node; at; at = at.parentElement) {
            const colour = parse(getComputedStyle(at).backgroundColor);
            if (colour.length === 3 || colour[3] > 0) return colour;
        }
        return [255, 255, 255];
    };
    let least = 21;
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const node = walker.currentNode.parentElement;
        if (!walker.currentNode.textContent.trim() || !node.getClientRects().length) continue;
        if (["SCRIPT", "STYLE", "NOSCRIPT", "TITLE", "OPTION"].includes(node.tagName) || node.tagName === "title") continue;
        const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))];
        least = Math.min(least, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
    }
    return least;
})()"#;

/// A request for an explanation from the node; its status and text.
fn curl(node: &Netns, arguments: &[&str]) -> String {
    let url = format!("{URL}api/v1/explain?protocol=tcp&client=192.0.2.10&listener=192.0.2.101:80");
    let output = node.command("curl").args(["-s", "-w", "%{http_code}", &url]).args(arguments).output();
    let said = String::from_utf8(output.expect("start curl").stdout).expect("text");
    let (text, status) = said.split_at(said.len() - 3);
    format!("{status} {text}")
}

/// Asks about a packet to a listener, and waits for the answer.
fn explained(browser: &mut Browser, listener: &str) {
    let fill = format!(
        "document.getElementById('explain-client').value = '192.0.2.10'; \
         document.getElementById('explain-listener').value = {listener:?}; \
         document.getElementById('explain').requestSubmit(); true"
    );
    assert_eq!(browser.value(&fill), true);
    browser.wait("document.querySelectorAll('#explain-steps li').length > 8");
}

fn keep(name: &str, picture: &[u8]) {
    // A PNG, and no empty one.
    assert!(picture.starts_with(b"\x89PNG") && picture.len() > 10_000, "{name}: {} bytes", picture.len());
    if let Some(folder) = std::env::var_os(PICTURES).map(PathBuf::from) {
        fs::create_dir_all(&folder).expect("make the folder");
        fs::write(folder.join(format!("{name}.png")), picture).expect("write the picture");
    }
}

#[test]
fn the_page_shows_what_goes_on_to_everybody() {
    let mut cluster = Cluster::new(2);
    cluster.reach.peers = true;
    for name in ["web.1", "web.2", "web.3"] {
        cluster.add_nginx(name, 0);
    }
    cluster.add_task("web.4", 0);
    let path = cluster.write_all_running();
    let node = &cluster.nodes[0].netns;
    let agent = Agent::attach(node, cluster.folder(), &path, &[]);
    let address: IpAddr = cluster.nodes[0].v4().into();
    requests(&cluster.client, address, 8);
    let load = Load::start(&cluster.client, address, 2, u64::MAX);
    let mut browser = Browser::start(node, cluster.folder());
    browser.open(URL, (1280, 900), false);
    browser.wait("Number(document.body?.dataset.looks || 0) >= 3");
    // A verdict, in words.
    browser.wait("document.getElementById('verdict').textContent.includes('DEGRADED')");
    browser.wait("document.getElementById('problems').textContent.includes('node node2')");
    // The service with its rotation: as many rows as tasks, and those that serve do so alike.
    let card = "document.querySelector('[data-service=web]')";
    assert_eq!(browser.value(&format!("{card}.querySelectorAll('.tasks li').length")), 4);
    within(Duration::from_secs(20), "the bars of the rotation are alike", || {
        let rates = browser.value(&format!(
            "[...{card}.querySelectorAll('.tasks li')].map((li) => parseFloat(li.querySelector('rect').getAttribute('width')))"
        ));
        let rates: Vec<f64> =
            rates.as_array().into_iter().flatten().filter_map(serde_json::Value::as_f64).collect();
        let serving: Vec<f64> = rates[..3].to_vec();
        serving.iter().all(|rate| *rate > 60.0)
    });
    assert_eq!(
        browser.value(&format!("{card}.textContent.includes('1 of 4 tasks refuse or do not answer')")),
        true
    );
    assert_eq!(browser.value(&format!("{card}.querySelector('[aria-label^=refuses]') !== null")), true);
    // Who is heard, what became of packets with its meaning, and what happened.
    let says = |browser: &mut Browser, id: &str, part: &str| {
        assert_eq!(
            browser.value(&format!("document.getElementById('{id}').textContent.includes({part:?})")),
            true,
            "{id}: {part}"
        );
    };
    says(&mut browser, "nodes", "SILENT");
    says(&mut browser, "outcomes", "Handed to a task on this node.");
    says(&mut browser, "events", "task web.4 on node1 refuses connections");
    says(&mut browser, "fills", "CONNECTIONS4");
    // What would become of a packet: the path, step by step, or why there is none.
    let mut explain = |client: &str, listener: &str| {
        let fill = format!(
            "document.getElementById('explain-client').value = {client:?}; \
             document.getElementById('explain-listener').value = {listener:?}; \
             document.getElementById('explain').requestSubmit(); true"
        );
        assert_eq!(browser.value(&fill), true);
        browser.wait("document.querySelector('#explain button').disabled === false");
        let said = browser.value("document.getElementById('explain-verdict').textContent");
        let steps =
            browser.value("[...document.querySelectorAll('#explain-steps li')].map((li) => li.textContent)");
        (said.as_str().unwrap_or_default().to_owned(), steps.as_array().cloned().unwrap_or_default())
    };
    let (said, steps) = explain("192.0.2.10", &format!("{address}:80"));
    assert!(said.starts_with("✓ forwarded (forwarded_local: "), "{said}");
    let names: Vec<&str> = steps.iter().filter_map(|step| step.as_str()).collect();
    assert!(names.len() > 8 && names.iter().any(|step| step.starts_with("choiceweb.")), "{names:?}");
    let (said, steps) = explain("192.0.2.10", &format!("{address}:81"));
    assert!(said.starts_with("→ passed to the host (not_ours: "), "{said} {steps:?}");
    let (said, steps) = explain("everybody", "192.0.2.1:80");
    assert!(said.starts_with("the client: write it like") && steps.is_empty(), "{said}");
    // No page elsewhere has the kernel verify programs.
    let status = "fetch('api/v1/explain?protocol=tcp&client=192.0.2.10&listener=192.0.2.1:80', { mode: 'no-cors' }).then((a) => a.status)";
    assert_eq!(browser.value(status), 200);
    // Nor does anybody have it verify two at once: who hangs up leaves his behind.
    let _hung_up = curl(node, &["-m", "0.05"]);
    let busy = curl(node, &[]);
    assert!(busy.starts_with("429 another packet is being explained"), "{busy}");
    within(Duration::from_secs(30), "the one that hung up is done", || curl(node, &[]).starts_with("200 "));
    let elsewhere = curl(node, &["-H", "Sec-Fetch-Site: cross-site"]);
    assert!(elsewhere.starts_with("403 packets are explained on the node itself"), "{elsewhere}");
    // Nothing comes from elsewhere, nothing that the policy forbids was tried.
    let loaded = "performance.getEntriesByType('resource').every((entry) => new URL(entry.name).origin === location.origin)";
    assert_eq!(browser.value(loaded), true);
    // Readable in the light and in the dark.
    for (dark, name) in [(false, "page-light"), (true, "page-dark")] {
        browser.open(URL, (1280, 900), dark);
        browser.wait("Number(document.body?.dataset.looks || 0) >= 3");
        explained(&mut browser, &format!("{address}:80"));
        let contrast = browser.value(CONTRAST).as_f64().expect("a number");
        assert!(contrast >= 4.5, "{name}: a contrast of {contrast:.2}");
        keep(name, &browser.picture());
    }
    // On a phone nothing sticks out.
    browser.open(URL, (390, 844), false);
    browser.wait("Number(document.body?.dataset.looks || 0) >= 3");
    explained(&mut browser, &format!("{address}:80"));
    assert_eq!(browser.value("document.documentElement.scrollWidth <= 390"), true);
    keep("page-phone", &browser.picture());
    // By keyboard: the first stop leads past the head, the others are where one can do something.
    let mut stops = Vec::new();
    for _ in 0..4 {
        browser.press("Tab");
        stops.push(browser.value("document.activeElement.id || document.activeElement.className"));
    }
    assert_eq!(stops, ["skip", "pause", "find", "scroll"]);
    // What everything is called, for who does not see it.
    let unnamed = "[...document.querySelectorAll('input, select, section, [role=img], meter')].filter((e) => \
         !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.closest('label'))).length";
    assert_eq!(browser.value(unnamed), 0);
    // Without an agent the page says so.
    assert_eq!(load.stop(), Vec::<String>::new());
    drop(agent);
    browser.wait("document.getElementById('verdict').textContent.includes('NO ANSWER')");
}
