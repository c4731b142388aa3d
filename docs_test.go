package atoll_test

import (
	"flag"
	"fmt"
	"go/parser"
	"go/token"
	"os"
	"strings"
	"testing"
)

var rewrite = flag.Bool("rewrite", false, "write generated documents anew")

// formats lists where the formats are drawn, in the order of docs/formats.md.
var formats = []struct{ title, file string }{
	{"Segments: batches and records", "internal/segment/format.go"},
	{"Segments: footers", "internal/segment/footer.go"},
	{"Segments: shards", "internal/segment/shape.go"},
	{"Segments: how they are read after a crash", "internal/segment/scan.go"},
	{"Disks: the superblock", "internal/segment/super.go"},
	{"Disks: the state file", "internal/node/states.go"},
	{"Media: manifest, notes", "internal/medium/format.go"},
	{"Media: coded segments", "internal/medium/encode.go"},
	{"Volumes: the map", "internal/medium/volume/format.go"},
	{"Pebble's files in a log", "internal/medium/pebblefs/format.go"},
	{"Wire: frames between members", "internal/wire/format.go"},
	{"Catalog: keys and values", "internal/catalog/format.go"},
}

const formatsHead = `# Formats

What Atoll writes to disks, wire and catalog. Every format carries a magic or a
kind, a version and checksums; golden files in the packages' testdata must be
readable for ever, and every decoder is fuzzed. An older version is read or
refused with a message that says so; nothing is rewritten in place.

This file is made from the drawings in the code: go test -run TestFormatsDoc -rewrite .

Locations in a log (64 bits): ordinal of the segment (32), block in the segment
(16), check bits (16: CRC32C of the block, folded, mixed with medium and key).
`

// The document of formats says what the code says.
func TestFormatsDoc(t *testing.T) {
	var b strings.Builder
	b.WriteString(formatsHead)
	for _, f := range formats {
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, f.file, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "\n## %s\n\nFrom `%s`.\n", f.title, f.file)
		drawings := 0
		for _, c := range file.Comments {
			if text := c.Text(); strings.Contains(text, "\n\t") {
				b.WriteString("\n" + drawing(text))
				drawings++
			}
		}
		if drawings == 0 {
			t.Errorf("%s draws no format", f.file)
		}
	}
	const path = "docs/formats.md"
	if *rewrite {
		if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != b.String() {
		t.Errorf("%s is not what the code says; run: go test -run TestFormatsDoc -rewrite .", path)
	}
}

// drawing turns a comment into Markdown: what is indented becomes a code block.
func drawing(text string) string {
	var b strings.Builder
	code, blanks := false, 0
	for _, l := range strings.Split(strings.TrimRight(text, "\n"), "\n") {
		if l == "" {
			blanks++
			continue
		}
		if indented := strings.HasPrefix(l, "\t"); indented != code {
			if code {
				b.WriteString("```\n\n")
			} else {
				b.WriteString("\n```\n")
			}
			code, blanks = indented, 0
		}
		b.WriteString(strings.Repeat("\n", blanks) + strings.TrimPrefix(l, "\t") + "\n")
		blanks = 0
	}
	if code {
		b.WriteString("```\n")
	}
	return b.String()
}
