//! Links of the documentation that lead nowhere.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

use crate::Result;

/// Checks the relative links of every Markdown file under `root`: the file must exist, and the
/// heading too if the link names one.
pub fn check(root: &Path) -> Result {
    let mut pages = HashMap::new();
    read_pages(root, &mut pages)?;
    let mut broken: Vec<String> = Vec::new();
    for (path, page) in &pages {
        let dead = page.links.iter().filter_map(|link| {
            let fault = fault(root, path, link, &pages)?;
            Some(format!(
                "{}: `{link}`: {fault}",
                path.strip_prefix(root).unwrap_or(path).display()
            ))
        });
        broken.extend(dead);
    }
    if !broken.is_empty() {
        broken.sort();
        return Err(format!("broken links:\n  {}", broken.join("\n  ")).into());
    }
    let links: usize = pages.values().map(|page| page.links.len()).sum();
    println!("  {links} links in {} pages", pages.len());
    Ok(())
}

/// What matters of a Markdown file.
#[derive(Debug, Default, PartialEq)]
struct Page {
    /// Targets of links and pictures, as written.
    links: Vec<String>,
    /// What a `#fragment` can name.
    anchors: HashSet<String>,
}

fn read_pages(folder: &Path, pages: &mut HashMap<PathBuf, Page>) -> Result {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let hidden = path
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes()[0] == b'.');
        if path.is_dir() {
            // Cargo marks target folders so.
            let is_cache = path.join("CACHEDIR.TAG").exists();
            if !hidden && !is_cache {
                read_pages(&path, pages)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "md") {
            let page = Page::parse(&fs::read_to_string(&path)?);
            pages.insert(path.canonicalize()?, page);
        }
    }
    Ok(())
}

/// What is wrong with `link` on the page at `path`, if anything is.
fn fault(
    root: &Path,
    path: &Path,
    link: &str,
    pages: &HashMap<PathBuf, Page>,
) -> Option<&'static str> {
    if link.contains("://") || link.starts_with("mailto:") {
        return None;
    }
    let (file, fragment) = match link.split_once('#') {
        Some((file, fragment)) => (file, Some(fragment)),
        None => (link, None),
    };
    let target = match file.strip_prefix('/') {
        _ if file.is_empty() => path.to_owned(),
        Some(from_root) => root.join(from_root),
        None => path.with_file_name(file),
    };
    let Ok(target) = target.canonicalize() else {
        return Some("no such file");
    };
    match (pages.get(&target), fragment) {
        (Some(page), Some(fragment)) if !page.anchors.contains(fragment) => Some("no such heading"),
        _ => None,
    }
}

impl Page {
    fn parse(text: &str) -> Self {
        let mut page = Page::default();
        let mut heading: Option<String> = None;
        let options =
            Options::ENABLE_TABLES | Options::ENABLE_FOOTNOTES | Options::ENABLE_HEADING_ATTRIBUTES;
        for event in Parser::new_ext(text, options) {
            match event {
                Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                    page.links.push(dest_url.into_string());
                }
                Event::Start(Tag::Heading { id, .. }) => {
                    page.anchors.extend(id.map(|id| id.into_string()));
                    heading = Some(String::new());
                }
                Event::End(TagEnd::Heading(_)) => {
                    let slug = slug(&heading.take().unwrap_or_default());
                    page.add_heading(slug);
                }
                Event::Text(text) | Event::Code(text) => {
                    if let Some(heading) = &mut heading {
                        heading.push_str(&text);
                    }
                }
                Event::Html(html) | Event::InlineHtml(html) => {
                    for name in ["href", "src"] {
                        page.links.extend(attributes(&html, name));
                    }
                    for name in ["id", "name"] {
                        page.anchors.extend(attributes(&html, name));
                    }
                }
                _ => {}
            }
        }
        page
    }

    /// Headings of the same text are told apart by a number.
    fn add_heading(&mut self, slug: String) {
        let numbered = (1..).map(|n| format!("{slug}-{n}"));
        let free = [slug.clone()]
            .into_iter()
            .chain(numbered)
            .find(|slug| !self.anchors.contains(slug));
        self.anchors.extend(free);
    }
}

/// The anchor that GitHub and mdBook give a heading.
fn slug(heading: &str) -> String {
    heading
        .trim()
        .to_lowercase()
        .chars()
        .filter(|c| c.is_alphanumeric() || " -_".contains(*c))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

/// Values of the attribute `name` in a piece of HTML.
fn attributes(html: &str, name: &str) -> Vec<String> {
    let opening = format!(" {name}=\"");
    html.split(&opening)
        .skip(1)
        .filter_map(|rest| Some(rest.split_once('"')?.0.to_owned()))
        .collect()
}

#[cfg(test)]
mod tests;
