use super::*;

/// A folder of files that is removed when it goes out of scope.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str, files: &[(&str, &str)]) -> Self {
        let id = std::process::id();
        let folder = Self(std::env::temp_dir().join(format!("cubesla-links-{name}-{id}")));
        for (path, text) in files {
            let path = folder.0.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        folder
    }

    fn check(&self) -> String {
        check(&self.0.canonicalize().unwrap())
            .map_or_else(|error| error.to_string(), |()| String::new())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

#[test]
fn good_links_pass() {
    let folder = Folder::new(
        "good",
        &[
            (
                "README.md",
                "# Top\n[a](docs/a.md) [b](docs/a.md#two-words) [c](#top) [d](docs) ![e](e.png)\n\
                 [f](https://example.com/none) [g](/docs/a.md) <mailto:x@example.com>\n[h]\n\n\
                 [h]: docs/a.md#named\n\n`[code](none.md)`\n\n```\n[code](none.md)\n```\n",
            ),
            ("e.png", ""),
            (
                "docs/a.md",
                "## Two words!\n## Other {#named}\n[up](../README.md#top)\n",
            ),
            ("target/CACHEDIR.TAG", ""),
            ("target/x.md", "[dead](none.md)"),
            (".hidden/x.md", "[dead](none.md)"),
        ],
    );
    assert_eq!(folder.check(), "");
}

#[test]
fn dead_links_are_all_named() {
    let folder = Folder::new(
        "dead",
        &[
            (
                "README.md",
                "# Top\n[a](none.md) [b](docs/a.md#none) [c](#none)\n<img src=\"none.png\">\n",
            ),
            ("docs/a.md", "[d](README.md)\n"),
        ],
    );
    let found = folder.check();
    for link in [
        "README.md: `none.md`: no such file",
        "README.md: `docs/a.md#none`: no such heading",
        "README.md: `#none`: no such heading",
        "README.md: `none.png`: no such file",
        "docs/a.md: `README.md`: no such file",
    ] {
        assert!(found.contains(link), "{link} is missing in: {found}");
    }
}

#[test]
fn headings_become_anchors() {
    let page =
        Page::parse("# `cargo xtask`: what, and why?\n# Same\n# Same\n<a name=\"old\"></a>\n");
    let expected = ["cargo-xtask-what-and-why", "same", "same-1", "old"];
    assert_eq!(page.anchors, expected.map(str::to_owned).into());
}
