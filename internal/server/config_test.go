package server

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
)

// origin returns a setting's value and where it comes from.
func origin(c *Config, key string) (string, string) {
	for _, s := range c.Settings() {
		if s.Key == key {
			return s.Value, s.Origin
		}
	}
	return "", ""
}

func TestConfigPrecedence(t *testing.T) {
	file := filepath.Join(t.TempDir(), "atoll.toml")
	text := "# comment\nmemory = \"300M\"\nspare = 7\nrack = \"r1\"\ndisk = [\"/a\", \"/b\"]\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	environ := []string{"HOME=/", "ATOLL_CONFIG=" + file, "ATOLL_SPARE=8", "ATOLL_RACK=r2", "ATOLL_DISK_LIMIT=5GB"}
	c, err := load(t, environ, "--rack", "r3", "--token", "A1-secret")
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range []struct{ key, value, origin string }{
		{"memory", "300M", "file " + file + ":2"},
		{"disk", "/a,/b", "file " + file + ":5"},
		{"spare", "8", "env ATOLL_SPARE"},
		{"disk-limit", "5000000000B", "env ATOLL_DISK_LIMIT"},
		{"rack", "r3", "flag --rack"},
		{"listen", "127.0.0.1:7400", "default"},
		{"token", "***", "flag --token"},
	} {
		if value, from := origin(c, w.key); value != w.value || from != w.origin {
			t.Errorf("%s = %q from %q, want %q from %q", w.key, value, from, w.value, w.origin)
		}
	}
	if len(c.Disks) != 2 || c.Spare != 8 || c.Memory != 300<<20 {
		t.Errorf("%+v", c)
	}
}

func TestConfigErrors(t *testing.T) {
	write := func(text string) string {
		file := filepath.Join(t.TempDir(), "atoll.toml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return "ATOLL_CONFIG=" + file
	}
	none := "ATOLL_CONFIG=/dev/null"
	for _, w := range []struct {
		name, env string
		args      []string
		want      string
		kind      error
	}{
		{"unknown key", write("memory = \"1G\"\ndisklimit = \"1G\"\n"), nil, `:2: unknown setting "disklimit"; did you mean "disk`, atoll.ErrInvalid},
		{"not TOML", write("memory = = 1"), nil, "read configuration", atoll.ErrInvalid},
		{"no such file", "ATOLL_CONFIG=/nowhere/x.toml", nil, "/nowhere/x.toml", atoll.ErrInvalid},
		{"bare size", none, []string{"--memory", "512"}, `setting memory = "512" (flag --memory): size "512" has no unit`, atoll.ErrInvalid},
		{"bad unit", none, []string{"--memory", "512X"}, "unknown unit", atoll.ErrInvalid},
		{"huge", none, []string{"--disk-limit", "99999999999P"}, "99999999999P", atoll.ErrTooLarge},
		{"little memory", none, []string{"--memory", "1M"}, "at least 64M", atoll.ErrInvalid},
		{"role", none, []string{"--roles", "node,king"}, `role "king"`, atoll.ErrInvalid},
		{"replicas", none, []string{"--replicas", "9"}, "replicas", atoll.ErrInvalid},
		{"address", none, []string{"--listen", "7400"}, "want host:port", atoll.ErrInvalid},
		{"any address", none, []string{"--listen", "0.0.0.0:7400"}, "--advertise", atoll.ErrInvalid},
		{"open NBD", none, []string{"--nbd", "10.0.0.1:10809"}, "--nbd-tls-ca", atoll.ErrDenied},
		{"half a certificate", none, []string{"--nbd-tls-cert", "x"}, "go together", atoll.ErrInvalid},
		{"join without token", none, []string{"--join", "h:1", "--data", t.TempDir()}, "atoll token create", atoll.ErrInvalid},
		{"curve sizes", none, []string{"--curve-sizes", "odd"}, "curve or any", atoll.ErrInvalid},
		{"no bool", none, []string{"--curve-precise-open=maybe"}, `setting curve-precise-open = "maybe" (flag --curve-precise-open): want true or false`, atoll.ErrInvalid},
		{"log format", none, []string{"--log-format", "xml"}, "text or json", atoll.ErrInvalid},
	} {
		_, err := load(t, []string{w.env}, w.args...)
		if err == nil || !strings.Contains(err.Error(), w.want) || !errors.Is(err, w.kind) {
			t.Errorf("%s: %v", w.name, err)
		}
	}
}

// Every setting is a flag, and a value that its own text gives again.
func TestConfigRoundTrip(t *testing.T) {
	c, err := load(t, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range settings() {
		again := &Config{origins: map[string]string{}}
		if err := s.set(again, s.get(c)); err != nil || s.get(again) != s.get(c) {
			t.Errorf("%s: %q becomes %q, %v", s.key, s.get(c), s.get(again), err)
		}
		if s.usage == "" || strings.HasSuffix(s.usage, ".") {
			t.Errorf("%s: usage %q", s.key, s.usage)
		}
	}
}
