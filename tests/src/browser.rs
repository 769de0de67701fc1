//! A real browser without a window, asked by its own protocol (Chrome DevTools): what a page looks like, and what it says.

use std::{fs, net::TcpStream, path::Path, process::Stdio, time::Duration};

use serde_json::{Value, json};
use tungstenite::{Message, WebSocket, client};

use crate::netns::{Netns, Running, succeeds};

/// A browser with one page.
pub struct Browser {
    socket: WebSocket<TcpStream>,
    asked: u64,
    _running: Running,
}

impl Browser {
    /// Starts one in a namespace, with nothing of another's in its folder.
    pub fn start(netns: &Netns, folder: &Path) -> Self {
        let profile = folder.join("browser");
        fs::create_dir_all(&profile).expect("make a folder");
        let mut command = netns.command("chromium");
        command.args([
            "--headless=new",
            // Root has no sandbox to be put into.
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--hide-scrollbars",
            "--remote-debugging-port=0",
        ]);
        command.arg(format!("--user-data-dir={}", profile.display())).arg("about:blank");
        let running = Running::start(command.stderr(Stdio::null()).stdout(Stdio::null()));
        let port: u16 = succeeds(Duration::from_secs(60), "the browser listens", || {
            let text =
                fs::read_to_string(profile.join("DevToolsActivePort")).map_err(|error| error.to_string())?;
            text.lines()
                .next()
                .and_then(|line| line.parse().ok())
                .ok_or_else(|| format!("no port in {text:?}"))
        });
        let socket = netns.enter(|| {
            let list: Value = succeeds(Duration::from_secs(30), "the browser has a page", || {
                let url = format!("http://127.0.0.1:{port}/json/list");
                let mut answer = ureq::get(&url).call().map_err(|error| error.to_string())?;
                let text = answer.body_mut().read_to_string().map_err(|error| error.to_string())?;
                serde_json::from_str(&text).map_err(|error| error.to_string())
            });
            let pages = list.as_array().expect("a list");
            let page = pages.iter().find(|page| page["type"] == "page").expect("a page");
            let url = page["webSocketDebuggerUrl"].as_str().expect("its address").to_owned();
            let stream = TcpStream::connect(("127.0.0.1", port)).expect("connect to the browser");
            stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a time limit");
            client(url.as_str(), stream).expect("talk to the browser").0
        });
        Self { socket, asked: 0, _running: running }
    }

    fn ask(&mut self, method: &str, parameters: Value) -> Value {
        self.asked += 1;
        let request = json!({ "id": self.asked, "method": method, "params": parameters });
        self.socket.send(Message::text(request.to_string())).expect("ask the browser");
        loop {
            let message = self.socket.read().expect("the browser's answer");
            let answer: Value = match message {
                Message::Text(text) => serde_json::from_str(&text).expect("JSON"),
                _ => continue,
            };
            if answer["id"] == self.asked {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].clone();
            }
        }
    }

    /// Opens a page on a screen of so many pixels, light or dark.
    pub fn open(&mut self, url: &str, (width, height): (u32, u32), dark: bool) {
        let screen =
            json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600 });
        self.ask("Emulation.setDeviceMetricsOverride", screen);
        let scheme = if dark { "dark" } else { "light" };
        let features = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.ask("Emulation.setEmulatedMedia", features);
        self.ask("Page.enable", json!({}));
        self.ask("Page.navigate", json!({ "url": url }));
    }

    /// What an expression comes to in the page.
    pub fn value(&mut self, expression: &str) -> Value {
        let asked = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let answer = self.ask("Runtime.evaluate", asked);
        assert!(answer["exceptionDetails"].is_null(), "{expression}: {answer}");
        answer["result"]["value"].clone()
    }

    /// Waits until an expression is true in the page.
    pub fn wait(&mut self, expression: &str) {
        succeeds(Duration::from_secs(30), expression, || {
            let value = self.value(expression);
            if value == true { Ok(()) } else { Err(format!("it is {value}")) }
        });
    }

    /// Presses a key.
    pub fn press(&mut self, key: &str) {
        for kind in ["keyDown", "keyUp"] {
            self.ask("Input.dispatchKeyEvent", json!({ "type": kind, "key": key, "code": key }));
        }
    }

    /// A picture of the whole page, as PNG.
    pub fn picture(&mut self) -> Vec<u8> {
        let asked = json!({ "format": "png", "captureBeyondViewport": true });
        let answer = self.ask("Page.captureScreenshot", asked);
        decode(answer["data"].as_str().expect("a picture"))
    }
}

/// Base64, as the protocol writes pictures.
fn decode(text: &str) -> Vec<u8> {
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    for group in text.trim_end_matches('=').as_bytes().chunks(4) {
        let word = group.iter().fold(0_u32, |word, byte| word << 6 | u32::from(digit(*byte)));
        let word = word << (6 * (4 - group.len()));
        bytes.extend(&word.to_be_bytes()[1..group.len()]);
    }
    bytes
}
