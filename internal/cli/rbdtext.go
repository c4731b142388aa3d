package cli

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/atollstore/atoll/internal/api/atollv1"
)

// field is one of a record, in the order of output.
type field struct {
	key   string
	value any // string, bool, a number, record or list
}

// record is an object of JSON or an element of XML.
type record []field

// list is an array; in XML each item is an element of the given name.
type list struct {
	of    string
	items []any
}

// add appends a field if ok.
func (r *record) add(ok bool, key string, value any) {
	if ok {
		*r = append(*r, field{key, value})
	}
}

// structured reports whether JSON or XML is wanted.
func (r *rbdCall) structured() bool {
	return r.option("format") == "json" || r.option("format") == "xml"
}

// emit prints v, whose name in XML is root, as JSON or XML.
func (r *rbdCall) emit(root string, v any) error {
	var b bytes.Buffer
	if r.option("format") == "xml" {
		writeXML(&b, root, v)
		fmt.Fprintln(r.Out, b.String())
		return nil
	}
	writeJSON(&b, v)
	if r.has("pretty-format") {
		var pretty bytes.Buffer
		if err := json.Indent(&pretty, b.Bytes(), "", "    "); err != nil {
			return fmt.Errorf("write json: %w", err)
		}
		b = pretty
	}
	fmt.Fprintln(r.Out, b.String())
	return nil
}

func writeJSON(b *bytes.Buffer, v any) {
	comma := func(i int) {
		if i > 0 {
			b.WriteByte(',')
		}
	}
	switch v := v.(type) {
	case record:
		b.WriteByte('{')
		for i, f := range v {
			comma(i)
			writeJSON(b, f.key)
			b.WriteByte(':')
			writeJSON(b, f.value)
		}
		b.WriteByte('}')
	case list:
		b.WriteByte('[')
		for i, item := range v.items {
			comma(i)
			writeJSON(b, item)
		}
		b.WriteByte(']')
	case string:
		var s bytes.Buffer
		enc := json.NewEncoder(&s)
		enc.SetEscapeHTML(false)
		_ = enc.Encode(v) // a string always encodes
		b.Write(bytes.TrimSpace(s.Bytes()))
	default:
		fmt.Fprint(b, v)
	}
}

func writeXML(b *bytes.Buffer, name string, v any) {
	b.WriteString("<" + name + ">")
	switch v := v.(type) {
	case record:
		for _, f := range v {
			writeXML(b, f.key, f.value)
		}
	case list:
		for _, item := range v.items {
			writeXML(b, v.of, item)
		}
	default:
		_ = xml.EscapeText(b, []byte(fmt.Sprint(v))) // a buffer takes all
	}
	b.WriteString("</" + name + ">")
}

// textTable prints rows as rbd does: headers on the left, values of columns that
// begin with ">" on the right, every column filled up to its width.
func textTable(w io.Writer, headers []string, rows [][]string) {
	width := make([]int, len(headers))
	right := make([]bool, len(headers))
	for i := range headers {
		headers[i], right[i] = strings.CutPrefix(headers[i], ">")
		width[i] = utf8.RuneCountInString(headers[i])
		for _, r := range rows {
			width[i] = max(width[i], utf8.RuneCountInString(r[i]))
		}
	}
	line := func(cells []string, head bool) {
		var b strings.Builder
		for i, c := range cells {
			if i > 0 {
				b.WriteString("  ")
			}
			pad := strings.Repeat(" ", width[i]-utf8.RuneCountInString(c))
			if right[i] && !head {
				b.WriteString(pad + c)
			} else {
				b.WriteString(c + pad)
			}
		}
		fmt.Fprintln(w, b.String())
	}
	line(headers, true)
	for _, r := range rows {
		line(r, false)
	}
}

// rbdSize writes a size as Ceph does, in few letters.
func rbdSize(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	i, whole := 0, n
	for whole >= 1024 && i < len(units)-1 {
		whole /= 1024
		i++
	}
	unit := int64(1) << (10 * i)
	if n%unit == 0 {
		return fmt.Sprintf("%d %s", whole, units[i])
	}
	for digits := 2; ; digits-- {
		if s := fmt.Sprintf("%.*f %s", digits, float64(n)/float64(unit), units[i]); len(s) <= 7 || digits == 0 {
			return s
		}
	}
}

// rbdTime writes a time as Ceph does.
func rbdTime(t time.Time) string { return t.Local().Format(time.ANSIC) }

// rbdID is the id of a volume as rbd's listings show it.
func rbdID(v *atollv1.Volume) string { return v.Id }
