package cli

import (
	"encoding/json"
	"errors"
	"math"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

func TestParseSize(t *testing.T) {
	for text, want := range map[string]int64{
		"0B": 0, "4096B": 4096, "1k": 1024, "1KiB": 1024, "1KB": 1000, "512M": 512 << 20, "10G": 10 << 30, "10GiB": 10 << 30,
		"10gib": 10 << 30, "10GB": 1e10, "1.5G": 3 << 29, "64T": 64 << 40, "0.5K": 512, "1P": 1 << 50, "4194304T": 1 << 62,
	} {
		if got, err := parseSize(text); got != want || err != nil {
			t.Errorf("%s: %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "10", "G", "-1G", "1 G", "1GG", "1X", "1.2.3G", "9999999999T", ".G", "1e3G", "١G"} {
		got, err := parseSize(text)
		if err == nil || ExitCode(err) != ExitUsage {
			t.Errorf("%q: %d, %v", text, got, err)
		}
	}
	if _, err := parseSize("10"); err == nil || !strings.Contains(err.Error(), "10G for GiB") {
		t.Errorf("a bare number: %v", err)
	}
}

func TestFormatSize(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 1: "1 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.5 KiB", 10 << 10: "10 KiB", 1<<20 - 1: "1 MiB", 1 << 20: "1 MiB",
		1234567: "1.18 MiB", 12345678: "11.8 MiB", 123456789: "118 MiB", 1023 << 20: "1023 MiB", 10 << 30: "10 GiB", 64 << 40: "64 TiB",
		math.MaxInt64: "8 EiB", -4096: "-4 KiB",
	} {
		if got := FormatSize(n); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
}

// The table of exit codes covers every kind of error, and the help every code.
func TestExitCodes(t *testing.T) {
	known := map[int]bool{}
	for _, e := range exitTexts {
		known[e.code] = true
	}
	for _, k := range atoll.Kinds() {
		found := 0
		for _, e := range exitKinds {
			if e.kind == k {
				found++
				if !known[e.code] {
					t.Errorf("%v has code %d, which is not explained", k, e.code)
				}
			}
		}
		if found != 1 {
			t.Errorf("%v is in the table %d times", k, found)
		}
	}
	if len(exitKinds) != len(atoll.Kinds()) {
		t.Errorf("%d entries for %d kinds", len(exitKinds), len(atoll.Kinds()))
	}
	if ExitCode(errors.New("odd")) != ExitOther || ExitCode(nil) != ExitOK {
		t.Error("codes of no kind")
	}
	for _, args := range [][]string{{"help", "exit-codes"}, {"exit-codes"}, {"exit-codes", "--help"}} {
		code, out, _ := run(t, args...)
		if code != 0 || !strings.Contains(out, "8  damaged data") || !strings.Contains(out, "130  interrupted") {
			t.Errorf("%v: %d %s", args, code, out)
		}
	}
}

// 64-bit integers are JSON numbers, whatever the field's name; texts that look
// like numbers stay texts.
func TestJSONNumbers(t *testing.T) {
	b, err := plainJSON(&atollv1.ListVolumesResponse{Volumes: []*atollv1.Volume{{Name: "123", SizeBytes: 1 << 50, Epoch: 7, Urls: []string{"456"}, Description: "789"}}})
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Volumes []struct {
			Name        string
			SizeBytes   int64
			MappedBytes int64
			Epoch       uint64
			Urls        []string
			Description string
			Open        *bool
		}
	}
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatalf("%s: %v", b, err)
	}
	if v := got.Volumes[0]; v.SizeBytes != 1<<50 || v.Epoch != 7 || v.Name != "123" || v.Urls[0] != "456" || v.Description != "789" || v.Open == nil {
		t.Errorf("%s", b)
	}
	b, err = plainJSON(&atollv1.CheckVolumeResponse{BytesRead: 5, Blocks: 6, Problems: []string{"7"}})
	if want := `{"blocks":6,"bytesRead":5,"checkedBytes":0,"damagedBytes":0,"problems":["7"],"repairedBytes":0,"unchecked":[]}`; err != nil || string(b) != want {
		t.Errorf("%s, %v", b, err)
	}
}

func TestShellQuote(t *testing.T) {
	for in, want := range map[string]string{
		"nbd://h/disk1": "nbd://h/disk1", "nbd+unix:///d?socket=/x": "'nbd+unix:///d?socket=/x'", "a'b c": `'a'\''b c'`, "": "",
	} {
		if got := shellQuote(in); got != want {
			t.Errorf("%q: %s, want %s", in, got, want)
		}
	}
}

func TestEditDistance(t *testing.T) {
	for _, w := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"abc", "abc", 0}, {"disk1", "disk2", 1}, {"dsk1", "disk1", 1}, {"", "abc", 3}, {"kitten", "sitting", 3}} {
		if got := editDistance(w.a, w.b); got != w.want {
			t.Errorf("%q to %q: %d, want %d", w.a, w.b, got, w.want)
		}
	}
}

// tooWide returns the lines that do not fit a terminal.
func tooWide(text string) (wide []string) {
	for _, l := range strings.Split(text, "\n") {
		if utf8.RuneCountInString(l) > columns {
			wide = append(wide, l)
		}
	}
	return wide
}
