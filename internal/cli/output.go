package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/atollstore/atoll/internal/atoll"
)

// table prints rows under headers, in columns two spaces apart. Columns whose
// header begins with ">" are right-aligned.
func (a *App) table(headers []string, rows [][]string) {
	width := make([]int, len(headers))
	right := make([]bool, len(headers))
	for i, h := range headers {
		h, right[i] = strings.CutPrefix(h, ">")
		headers[i] = h
		width[i] = utf8.RuneCountInString(h)
		for _, r := range rows {
			width[i] = max(width[i], utf8.RuneCountInString(r[i]))
		}
	}
	line := func(cells []string) {
		var b strings.Builder
		for i, c := range cells {
			pad := strings.Repeat(" ", width[i]-utf8.RuneCountInString(c))
			if right[i] {
				b.WriteString(pad + c)
			} else {
				b.WriteString(c + pad)
			}
			b.WriteString("  ")
		}
		fmt.Fprintln(a.Out, strings.TrimRight(b.String(), " "))
	}
	line(headers)
	for _, r := range rows {
		line(r)
	}
}

// json prints a message of the API as one document, with sizes as integers.
func (a *App) json(m proto.Message) error {
	b, err := plainJSON(m)
	if err != nil {
		return err
	}
	var out bytes.Buffer
	if a.output == "json" {
		err = json.Indent(&out, b, "", "  ")
	} else {
		err = json.Compact(&out, b)
	}
	if err != nil {
		return fmt.Errorf("write json: %w", err)
	}
	out.WriteByte('\n')
	_, err = io.Copy(a.Out, &out)
	return err
}

// show prints m as JSON if that is wanted, else whatever table prints.
func (a *App) show(m proto.Message, table func()) error {
	if a.output != "table" {
		return a.json(m)
	}
	table()
	return nil
}

// showList is show for an answer that is a list: each of it is a line of jsonl.
func showList[M proto.Message](a *App, m proto.Message, list []M, table func()) error {
	if a.output == "jsonl" {
		return jsonLines(a, list)
	}
	return a.show(m, table)
}

// plain prints what is no message of the API as JSON.
func (a *App) plain(v any) error {
	b, err := json.Marshal(v)
	if a.output == "json" && err == nil {
		b, err = json.MarshalIndent(v, "", "  ")
	}
	if err != nil {
		return fmt.Errorf("write json: %w", err)
	}
	_, err = fmt.Fprintln(a.Out, string(b))
	return err
}

// jsonLines prints messages one a line.
func jsonLines[M proto.Message](a *App, list []M) error {
	for _, m := range list {
		if err := a.json(m); err != nil {
			return err
		}
	}
	return nil
}

// plainJSON is protojson with 64-bit integers as JSON numbers, as people and jq
// expect of byte counts; they stay exact up to 2^53.
func plainJSON(m proto.Message) ([]byte, error) {
	b, err := protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("write json: %w", err)
	}
	var v any
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	if err := dec.Decode(&v); err != nil {
		return nil, fmt.Errorf("write json: %w", err)
	}
	return json.Marshal(numbers(v, m.ProtoReflect().Descriptor()))
}

// numbers turns the quoted integers of protojson into numbers where the fields
// of the message are integers.
func numbers(v any, d protoreflect.MessageDescriptor) any {
	fields, ok := v.(map[string]any)
	if !ok {
		return v // a well-known type, such as a time
	}
	for key, value := range fields {
		f := d.Fields().ByJSONName(key)
		if f == nil || f.IsMap() {
			continue
		}
		list, repeated := value.([]any)
		if !repeated {
			fields[key] = number(value, f)
			continue
		}
		for i := range list {
			list[i] = number(list[i], f)
		}
	}
	return fields
}

func number(v any, f protoreflect.FieldDescriptor) any {
	switch f.Kind() {
	case protoreflect.MessageKind:
		return numbers(v, f.Message())
	case protoreflect.Int64Kind, protoreflect.Uint64Kind, protoreflect.Sint64Kind, protoreflect.Fixed64Kind, protoreflect.Sfixed64Kind:
		if s, ok := v.(string); ok {
			return json.Number(s)
		}
	}
	return v
}

// size formats bytes with three significant digits in IEC units, or exactly.
func (a *App) size(n int64) string {
	if a.exact {
		return strconv.FormatInt(n, 10)
	}
	return FormatSize(n)
}

// FormatSize formats bytes with three significant digits in IEC units.
func FormatSize(n int64) string {
	if n < 0 {
		return "-" + FormatSize(-n)
	}
	if n < 1024 {
		return strconv.FormatInt(n, 10) + " B"
	}
	f := float64(n)
	for _, unit := range []string{"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"} {
		f /= 1024
		if f < 1023.5 || unit == "EiB" {
			prec := 0
			if f < 9.995 {
				prec = 2
			} else if f < 99.95 {
				prec = 1
			}
			s := strconv.FormatFloat(f, 'f', prec, 64)
			if strings.Contains(s, ".") {
				s = strings.TrimRight(strings.TrimRight(s, "0"), ".")
			}
			return s + " " + unit
		}
	}
	return ""
}

// parseSize is atoll.ParseSize for the command line.
func parseSize(s string) (int64, error) {
	n, err := atoll.ParseSize(s)
	if err != nil {
		return 0, usageError{err}
	}
	return n, nil
}

// ago formats how long ago t was.
func ago(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	d := time.Since(t)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}
