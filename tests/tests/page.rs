//! The page that the agent serves, in a real browser: what it says, that it fits a phone and a desk, that it can be read and
//! worked by keyboard, and that nothing of it comes from elsewhere.

use std::{fs, net::IpAddr, path::PathBuf, time::Duration};

use lb_tests::{
    agent::Agent,
    browser::Browser,
    cluster::Cluster,
    netns::within,
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
    browser.wait("Number(document.body.dataset.looks || 0) >= 3");
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
    says(&mut browser, "fills", "FLOWS4");
    // Nothing comes from elsewhere, nothing that the policy forbids was tried.
    let loaded = "performance.getEntriesByType('resource').every((entry) => new URL(entry.name).origin === location.origin)";
    assert_eq!(browser.value(loaded), true);
    // Readable in the light and in the dark.
    for (dark, name) in [(false, "page-light"), (true, "page-dark")] {
        browser.open(URL, (1280, 900), dark);
        browser.wait("Number(document.body.dataset.looks || 0) >= 3");
        let contrast = browser.value(CONTRAST).as_f64().expect("a number");
        assert!(contrast >= 4.5, "{name}: a contrast of {contrast:.2}");
        keep(name, &browser.picture());
    }
    // On a phone nothing sticks out.
    browser.open(URL, (390, 844), false);
    browser.wait("Number(document.body.dataset.looks || 0) >= 3");
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
