//! Printing lists as Docker does: a table, names, a template or JSON; rows chosen by filters; again every second.

use std::time::Duration;

use anyhow::{Result, bail};
use comfy_table::{Table, presets};
use serde::Serialize;
use serde_json::{Value, json};

use super::out;
use crate::cli::{ListArgs, Output};

/// Between two looks of `--watch`.
pub const PERIOD: Duration = Duration::from_secs(1);
/// On a terminal a cell is shortened to so many characters.
const WIDE: usize = 60;

/// A column: its header, and what a row says in it.
pub struct Column(pub &'static str, pub fn(&Value) -> String);

/// The rows of one interface.
pub struct Rows {
    /// The interface.
    pub interface: String,
    /// Objects with the same fields each.
    pub rows: Vec<Value>,
}

impl Rows {
    /// Of what can be written as JSON.
    ///
    /// # Errors
    /// It cannot.
    pub fn of<T: Serialize>(interface: &str, rows: &[T]) -> Result<Self> {
        let rows: Result<Vec<Value>, _> = rows.iter().map(serde_json::to_value).collect();
        Ok(Self { interface: interface.to_owned(), rows: rows? })
    }
}

/// Prints a list, again every second if asked to. `field` is its name in JSON, `extra` goes beside it.
///
/// # Errors
/// It cannot be read or written, or a filter or template names a field that there is not.
pub async fn show(
    arguments: &ListArgs,
    (field, extra): (&str, Value),
    columns: &[Column],
    read: impl Fn() -> Result<Vec<Rows>>,
) -> Result<()> {
    let mut first = true;
    loop {
        let mut lists = read()?;
        for list in &mut lists {
            let rows = std::mem::take(&mut list.rows);
            list.rows = filter(rows, &arguments.filter)?;
        }
        if arguments.watch && arguments.read.output == Output::Table {
            out::redraw(first)?;
        }
        print(arguments, (field, &extra), columns, &lists)?;
        if !arguments.watch {
            return Ok(());
        }
        first = false;
        tokio::time::sleep(PERIOD).await;
    }
}

fn print(
    arguments: &ListArgs,
    (field, extra): (&str, &Value),
    columns: &[Column],
    lists: &[Rows],
) -> Result<()> {
    let several = lists.len() > 1;
    if arguments.quiet || arguments.format.is_some() {
        let template = arguments.format.as_deref().unwrap_or("{{.Name}}");
        for row in lists.iter().flat_map(|list| &list.rows) {
            out::line(fill(template, row)?)?;
        }
        return Ok(());
    }
    if arguments.read.output == Output::Json {
        let interfaces = lists.iter().map(|list| {
            let mut document = json!({ "interface": list.interface, field: list.rows });
            if let (Some(document), Some(extra)) = (document.as_object_mut(), extra.as_object()) {
                document.extend(extra.clone());
            }
            document
        });
        return out::json(json!({ "interfaces": interfaces.collect::<Vec<_>>() }), arguments.watch);
    }
    let short = !arguments.no_trunc && out::is_terminal();
    for list in lists {
        let mut rows = table(columns.iter().map(|Column(header, _)| *header));
        for row in &list.rows {
            rows.add_row(columns.iter().map(|Column(_, cell)| shorten(cell(row), short)));
        }
        table_out(&list.interface, several, &rows)?;
    }
    Ok(())
}

fn shorten(text: String, short: bool) -> String {
    match text.char_indices().nth(WIDE) {
        Some((at, _)) if short => format!("{}…", &text[..at]),
        _ => text,
    }
}

/// What a field of a row says, as people read it.
pub fn text(row: &Value, field: &str) -> String {
    match &row[field] {
        Value::Null => String::new(),
        // A name is one line, whatever is in it.
        Value::String(text) => crate::text::clean(text).into_owned(),
        Value::Array(values) => {
            let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            values.iter().map(text).collect::<Vec<_>>().join(", ")
        }
        other => other.to_string(),
    }
}

/// Docker's field names and ours: `.OpenConnections`, `open_connections`.
fn plain(name: &str) -> String {
    name.trim().trim_start_matches('.').replace(['_', '-'], "").to_lowercase()
}

/// The name that a row has for a field.
fn field_of(row: &Value, name: &str) -> Result<String> {
    let fields = row.as_object();
    let found = fields.and_then(|fields| fields.keys().find(|field| plain(field) == plain(name)));
    match found {
        Some(field) => Ok(field.clone()),
        None => bail!(
            "there is no field {:?}; those there are: {}",
            name.trim(),
            fields.into_iter().flat_map(|fields| fields.keys()).cloned().collect::<Vec<_>>().join(", ")
        ),
    }
}

/// The rows that all filters choose.
fn filter(rows: Vec<Value>, filters: &[String]) -> Result<Vec<Value>> {
    let mut chosen = Vec::with_capacity(rows.len());
    for row in rows {
        if chooses(&row, filters)? {
            chosen.push(row);
        }
    }
    Ok(chosen)
}

/// Whether all filters choose a row.
///
/// # Errors
/// A filter names a field that there is not.
pub fn chooses(row: &Value, filters: &[String]) -> Result<bool> {
    let mut chosen = true;
    for filter in filters {
        let (name, value) = filter.split_once('=').map_or((filter.as_str(), None), |(n, v)| (n, Some(v)));
        let (name, not) = name.strip_suffix('!').map_or((name, false), |name| (name, true));
        let field = field_of(row, name)?;
        let said = text(row, &field);
        chosen &= match value {
            None => !matches!(said.as_str(), "" | "0" | "false"),
            Some(value) if field == "name" => said.contains(value) != not,
            Some(value) => (said == value) != not,
        };
    }
    Ok(chosen)
}

/// A template, its fields filled in.
///
/// # Errors
/// It names a field that there is not, or does not end one.
pub fn fill(template: &str, row: &Value) -> Result<String> {
    let template = template.replace("\\t", "\t").replace("\\n", "\n");
    let mut filled = String::new();
    let mut rest = template.as_str();
    while let Some((before, after)) = rest.split_once("{{") {
        let Some((name, after)) = after.split_once("}}") else {
            bail!("the template {template:?} has a {{{{ without its }}}}");
        };
        filled += before;
        filled += &match name.trim() {
            "json ." => row.to_string(),
            name => text(row, &field_of(row, name)?),
        };
        rest = after;
    }
    Ok(filled + rest)
}

/// A table as Docker prints them: columns apart, no lines.
pub fn table<'a>(header: impl IntoIterator<Item = &'a str>) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(header);
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    table
}

/// Prints a table without blanks at the ends of lines, under the interface's name where there are several.
///
/// # Errors
/// It cannot be written.
pub fn table_out(interface: &str, several: bool, table: &Table) -> Result<()> {
    if several {
        out::line(format!("{interface}:"))?;
    }
    table.lines().try_for_each(|line| out::line(line.trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Vec<Value> {
        vec![
            json!({ "name": "web.1", "node": "node1", "open_connections": 3, "problem": null }),
            json!({ "name": "web.2", "node": "node2", "open_connections": 0, "problem": "silent" }),
        ]
    }

    fn names(filters: &[&str]) -> Vec<String> {
        let filters: Vec<String> = filters.iter().map(|text| (*text).to_owned()).collect();
        filter(rows(), &filters).unwrap().iter().map(|row| text(row, "name")).collect()
    }

    #[test]
    fn filters_choose_rows() {
        assert_eq!(names(&[]), ["web.1", "web.2"]);
        assert_eq!(names(&["name=web"]), ["web.1", "web.2"]);
        assert_eq!(names(&["name=b.2"]), ["web.2"]);
        assert_eq!(names(&["Node=node1"]), ["web.1"]);
        assert_eq!(names(&["node!=node1"]), ["web.2"]);
        assert_eq!(names(&["node=node"]), [""; 0]);
        assert_eq!(names(&["problem"]), ["web.2"]);
        assert_eq!(names(&["OpenConnections"]), ["web.1"]);
        assert_eq!(names(&["node=node1", "problem"]), [""; 0]);
        let error = filter(rows(), &["nod=x".to_owned()]).unwrap_err().to_string();
        assert_eq!(
            error,
            "there is no field \"nod\"; those there are: name, node, open_connections, problem"
        );
    }

    #[test]
    fn templates_are_filled_in() {
        let row = &rows()[0];
        assert_eq!(fill("{{.Name}}\\t{{ .OpenConnections }}!", row).unwrap(), "web.1\t3!");
        assert_eq!(fill("{{json .}}", row).unwrap(), row.to_string());
        assert!(fill("{{.Nam}}", row).unwrap_err().to_string().contains("no field \".Nam\""));
        assert!(fill("{{.Name", row).unwrap_err().to_string().contains("without its"));
    }

    #[test]
    fn cells_are_shortened_only_for_a_terminal() {
        let long = "é".repeat(WIDE + 1);
        assert_eq!(shorten(long.clone(), false), long);
        assert_eq!(shorten(long, true), format!("{}…", "é".repeat(WIDE)));
        assert_eq!(shorten("x".repeat(WIDE), true), "x".repeat(WIDE));
    }
}
