package server

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/pflag"

	"github.com/atollstore/atoll/internal/atoll"
)

// Config is what a server can be told. Each field has a flag (--disk-limit), an
// environment variable (ATOLL_DISK_LIMIT) and a key in the TOML file
// (disk-limit); flags win over the environment, that over the file.
type Config struct {
	Data       string   // directory for everything that is not on a disk of its own
	Disks      []string // one directory for each storage node
	Roles      []string // controller, node, gateway
	Listen     string   // control API; the next ports are wire and etcd peers
	Advertise  string   // host name or address that others reach this server by
	NBD        string   // NBD on TCP, empty for none
	NBDSocket  string   // NBD on a Unix socket
	TLSCert    string   // of the NBD server
	TLSKey     string
	TLSCA      string // clients must show a certificate of this authority
	Join       string // API address of a server of the cluster to join
	Token      string
	Etcd       []string      // external etcd endpoints instead of the embedded one
	Replicas   int           // default for new media, 0 = min(3, nodes)
	Memory     int64         // bytes for caches and buffers together
	DiskLimit  int64         // bytes that a node may use, 0 = the disk
	Spare      int           // prewritten segment files kept ready on each disk
	Host, Rack string        // failure domains
	RepairFrom time.Duration // how long a node may be down before others take its place
	RepairRate int64         // bytes a second that one node copies for that at most, 0 = what it can
	EvictAfter time.Duration // how long a node keeps copies that it need not hold any more
	TrashKeep  time.Duration // how long removed media can be brought back; 0: not at all
	CurveAuth  string        // trust, strict, or empty for what fits the address
	CurveRoot  string        // root's password for Curve's clients, while the user root has none
	CurveSizes string        // lengths that Curve's clients may give volumes: curve or any
	CurveOpen  bool          // a refused open tells Curve's clients its true code
	CurveLimit bool          // volumes of Curve's clients get the limits that Curve computes
	LogLevel   string
	LogFormat  string

	origins map[string]string
	nodes   int // node directories made under Data when Disks is empty
}

// setting ties a key to a field.
type setting struct {
	key, def, usage string
	list, boolean   bool
	secret          bool
	set             func(*Config, string) error
	get             func(*Config) string
}

func str(field func(*Config) *string) (func(*Config, string) error, func(*Config) string) {
	return func(c *Config, v string) error { *field(c) = v; return nil },
		func(c *Config) string { return *field(c) }
}

func strs(field func(*Config) *[]string) (func(*Config, string) error, func(*Config) string) {
	return func(c *Config, v string) error {
			*field(c) = nil
			for _, s := range strings.Split(v, ",") {
				if s = strings.TrimSpace(s); s != "" {
					*field(c) = append(*field(c), s)
				}
			}
			return nil
		},
		func(c *Config) string { return strings.Join(*field(c), ",") }
}

func num(field func(*Config) *int, low, high int) (func(*Config, string) error, func(*Config) string) {
	return func(c *Config, v string) error {
			n, err := strconv.Atoi(v)
			if err != nil || n < low || n > high {
				return fmt.Errorf("want a number from %d to %d: %w", low, high, atoll.ErrInvalid)
			}
			*field(c) = n
			return nil
		},
		func(c *Config) string { return strconv.Itoa(*field(c)) }
}

func boolean(field func(*Config) *bool) (func(*Config, string) error, func(*Config) string) {
	return func(c *Config, v string) error {
			b, err := strconv.ParseBool(v)
			if err != nil {
				return fmt.Errorf("want true or false: %w", atoll.ErrInvalid)
			}
			*field(c) = b
			return nil
		},
		func(c *Config) string { return strconv.FormatBool(*field(c)) }
}

func size(field func(*Config) *int64) (func(*Config, string) error, func(*Config) string) {
	return func(c *Config, v string) error {
			n, err := atoll.ParseSize(v)
			if err != nil {
				return err
			}
			*field(c) = n
			return nil
		},
		func(c *Config) string { return atoll.FormatSize(*field(c)) }
}

func span(field func(*Config) *time.Duration) (func(*Config, string) error, func(*Config) string) {
	return func(c *Config, v string) error {
			d, err := parseSpan(v)
			if err != nil {
				return err
			}
			*field(c) = d
			return nil
		},
		func(c *Config) string { return formatSpan(*field(c)) }
}

// parseSpan reads a time such as 90m, 24h or 7d.
func parseSpan(text string) (time.Duration, error) {
	bad := fmt.Errorf("want a time such as 90m, 24h or 7d: %w", atoll.ErrInvalid)
	if days, ok := strings.CutSuffix(text, "d"); ok {
		n, err := strconv.Atoi(days)
		if err != nil || n < 0 || n > 36500 {
			return 0, bad
		}
		return time.Duration(n) * 24 * time.Hour, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < 0 {
		return 0, bad
	}
	return d, nil
}

// formatSpan is the inverse of parseSpan.
func formatSpan(d time.Duration) string {
	for _, u := range []struct {
		unit time.Duration
		name string
	}{{time.Hour, "h"}, {time.Minute, "m"}, {time.Second, "s"}} {
		if d >= u.unit && d%u.unit == 0 {
			return strconv.FormatInt(int64(d/u.unit), 10) + u.name
		}
	}
	return d.String()
}

// settings returns the table of all settings, in the order of help texts.
func settings() []setting {
	var out []setting
	add := func(key, def, usage string, set func(*Config, string) error, get func(*Config) string) *setting {
		out = append(out, setting{key: key, def: def, usage: usage, set: set, get: get})
		return &out[len(out)-1]
	}
	s, g := str(func(c *Config) *string { return &c.Data })
	add("data", defaultData(), "directory for the cluster's metadata, keys and (without --disk) disks", s, g)
	s, g = strs(func(c *Config) *[]string { return &c.Disks })
	add("disk", "", "directory on a disk that holds data, one storage node each; repeatable (default: three under --data)", s, g).list = true
	s, g = strs(func(c *Config) *[]string { return &c.Roles })
	add("roles", "controller,node,gateway", "what this server does: controller, node, gateway", s, g).list = true
	s, g = str(func(c *Config) *string { return &c.Listen })
	add("listen", "127.0.0.1:7400", "address of the control API (TLS only beyond loopback); the two ports after it serve the members", s, g)
	s, g = str(func(c *Config) *string { return &c.Advertise })
	add("advertise", "", "host that others reach this server by (default: that of --listen)", s, g)
	s, g = str(func(c *Config) *string { return &c.NBD })
	add("nbd", "127.0.0.1:10809", "address of NBD on TCP, or none", s, g)
	s, g = str(func(c *Config) *string { return &c.NBDSocket })
	add("nbd-socket", "", "path of NBD's Unix socket (default: nbd.sock in the data directory)", s, g)
	s, g = str(func(c *Config) *string { return &c.TLSCert })
	add("nbd-tls-cert", "", "certificate (PEM) of the NBD server; makes TLS a must on TCP", s, g)
	s, g = str(func(c *Config) *string { return &c.TLSKey })
	add("nbd-tls-key", "", "its key (PEM)", s, g)
	s, g = str(func(c *Config) *string { return &c.TLSCA })
	add("nbd-tls-ca", "", "authority (PEM) whose certificates NBD clients must show", s, g)
	s, g = str(func(c *Config) *string { return &c.Join })
	add("join", "", "API address of a server whose cluster to join", s, g)
	s, g = str(func(c *Config) *string { return &c.Token })
	add("token", "", `token from "atoll token create", to join with`, s, g).secret = true
	s, g = strs(func(c *Config) *[]string { return &c.Etcd })
	add("etcd", "", "endpoints of an external etcd instead of the embedded one", s, g).list = true
	s, g = num(func(c *Config) *int { return &c.Replicas }, 0, atoll.MaxCopies)
	add("replicas", "0", "copies of new volumes' data (0: three, or as many as there are nodes)", s, g)
	s, g = size(func(c *Config) *int64 { return &c.Memory })
	add("memory", "1G", "memory for caches and buffers", s, g)
	s, g = size(func(c *Config) *int64 { return &c.DiskLimit })
	add("disk-limit", "0B", "bytes that each storage node may use (0B: the whole disk)", s, g)
	s, g = num(func(c *Config) *int { return &c.Spare }, 0, 64)
	add("spare", "3", "prewritten 64 MiB segment files kept ready on each disk", s, g)
	s, g = str(func(c *Config) *string { return &c.Host })
	add("host", "", "name of this machine as a failure domain (default: the host name)", s, g)
	s, g = str(func(c *Config) *string { return &c.Rack })
	add("rack", "", "name of the rack it stands in", s, g)
	s, g = span(func(c *Config) *time.Duration { return &c.RepairFrom })
	add("repair-after", "5m", "how long a node may be down before its copies are made anew on others; the elected controller's counts", s, g)
	s, g = size(func(c *Config) *int64 { return &c.RepairRate })
	add("repair-rate", "0B", "bytes a second that each node copies for repair at most (0B: all it can while idle, a part of that while in use)", s, g)
	s, g = span(func(c *Config) *time.Duration { return &c.EvictAfter })
	add("evict-after", "10m", "how long a node keeps copies that other nodes have taken over", s, g)
	s, g = span(func(c *Config) *time.Duration { return &c.TrashKeep })
	add("trash-keep", "24h", "how long removed volumes stay in the trash (0: they are deleted at once)", s, g)
	s, g = str(func(c *Config) *string { return &c.CurveAuth })
	add("curve-auth", "", "Curve's clients: trust their word who they are, or strict, every user proves a password (default: trust on loopback, else strict)", s, g)
	s, g = str(func(c *Config) *string { return &c.CurveRoot })
	add("curve-root-password", "", "password of root for Curve's clients while the user root has none of its own (default: the one that Curve is shipped with)", s, g).secret = true
	s, g = str(func(c *Config) *string { return &c.CurveSizes })
	add("curve-sizes", "curve", "lengths of the volumes that Curve's clients make: curve (10 GiB to 20 TiB in steps of 1 GiB) or any", s, g)
	s, g = boolean(func(c *Config) *bool { return &c.CurveOpen })
	add("curve-precise-open", "false", "a refused open tells Curve's clients why, not always -2", s, g).boolean = true
	s, g = boolean(func(c *Config) *bool { return &c.CurveLimit })
	add("curve-default-limits", "false", "volumes that Curve's clients make get the limits that Curve computes from their length", s, g).boolean = true
	s, g = str(func(c *Config) *string { return &c.LogLevel })
	add("log-level", "info", "debug, info, warn or error", s, g)
	s, g = str(func(c *Config) *string { return &c.LogFormat })
	add("log-format", "text", "text or json", s, g)
	return out
}

// defaultData is /var/lib/atoll for root, else in the user's data directory.
func defaultData() string {
	if os.Getuid() == 0 {
		return "/var/lib/atoll"
	}
	if d := os.Getenv("XDG_DATA_HOME"); d != "" {
		return filepath.Join(d, "atoll")
	}
	if home, err := os.UserHomeDir(); err == nil {
		return filepath.Join(home, ".local", "share", "atoll")
	}
	return "atoll-data"
}

// AddFlags adds a flag for each setting to fs, and --config.
func AddFlags(fs *pflag.FlagSet) {
	fs.String("config", "", "TOML file with settings (env ATOLL_CONFIG; default /etc/atoll/atoll.toml if there)")
	for _, s := range settings() {
		if s.list {
			fs.StringSlice(s.key, nil, s.usage)
			continue
		}
		fs.String(s.key, s.def, s.usage)
		if s.boolean {
			fs.Lookup(s.key).NoOptDefVal = "true"
		}
	}
}

// LoadConfig reads the settings: defaults, file, environment, flags. environ is
// as from os.Environ.
func LoadConfig(fs *pflag.FlagSet, environ []string) (*Config, error) {
	c := &Config{origins: map[string]string{}, nodes: 3}
	env := map[string]string{}
	for _, kv := range environ {
		if k, v, ok := strings.Cut(kv, "="); ok && strings.HasPrefix(k, "ATOLL_") {
			env[k] = v
		}
	}
	file, err := loadFile(fs, env)
	if err != nil {
		return nil, err
	}
	for _, s := range settings() {
		value, origin := s.def, "default"
		if v, ok := file.values[s.key]; ok {
			value, origin = v.text, fmt.Sprintf("file %s:%d", file.path, v.line)
		}
		name := "ATOLL_" + strings.ToUpper(strings.ReplaceAll(s.key, "-", "_"))
		if v, ok := env[name]; ok {
			value, origin = v, "env "+name
		}
		if f := fs.Lookup(s.key); f != nil && f.Changed {
			value, origin = f.Value.String(), "flag --"+s.key
			if s.list {
				list, err := fs.GetStringSlice(s.key)
				if err != nil {
					return nil, fmt.Errorf("flag --%s: %w", s.key, err)
				}
				value = strings.Join(list, ",")
			}
		}
		if err := s.set(c, value); err != nil {
			return nil, fmt.Errorf("setting %s = %q (%s): %w", s.key, value, origin, err)
		}
		c.origins[s.key] = origin
	}
	if err := c.absolute(); err != nil {
		return nil, err
	}
	return c, c.check()
}

// absolute makes paths independent of the working directory.
func (c *Config) absolute() (err error) {
	paths := []*string{&c.Data, &c.NBDSocket, &c.TLSCert, &c.TLSKey, &c.TLSCA}
	for i := range c.Disks {
		paths = append(paths, &c.Disks[i])
	}
	for _, p := range paths {
		if *p == "" {
			continue
		}
		if *p, err = filepath.Abs(*p); err != nil {
			return fmt.Errorf("path %s: %w", *p, err)
		}
	}
	return nil
}

// configFile is a parsed TOML file.
type configFile struct {
	path   string
	values map[string]fileValue
}

type fileValue struct {
	text string
	line int
}

// loadFile reads the TOML file that the flag or environment names, or the
// default one if it is there.
func loadFile(fs *pflag.FlagSet, env map[string]string) (configFile, error) {
	path, must := "/etc/atoll/atoll.toml", false
	if v, ok := env["ATOLL_CONFIG"]; ok {
		path, must = v, true
	}
	if f := fs.Lookup("config"); f != nil && f.Changed {
		path, must = f.Value.String(), true
	}
	out := configFile{path: path, values: map[string]fileValue{}}
	text, err := os.ReadFile(path)
	if os.IsNotExist(err) && !must {
		return out, nil
	}
	if err != nil {
		return out, fmt.Errorf("read configuration: %v: %w", err, atoll.ErrInvalid)
	}
	var raw map[string]any
	if err := toml.Unmarshal(text, &raw); err != nil {
		return out, fmt.Errorf("read configuration %s: %v: %w", path, err, atoll.ErrInvalid)
	}
	known := map[string]bool{}
	for _, s := range settings() {
		known[s.key] = true
	}
	keys := make([]string, 0, len(raw))
	for k := range raw {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	for _, k := range keys {
		line := lineOf(string(text), k)
		if !known[k] {
			return out, fmt.Errorf("configuration %s:%d: unknown setting %q%s: %w", path, line, k, nearest(k, known), atoll.ErrInvalid)
		}
		out.values[k] = fileValue{tomlText(raw[k]), line}
	}
	return out, nil
}

// tomlText gives a value the form that the flag would have.
func tomlText(v any) string {
	if list, ok := v.([]any); ok {
		parts := make([]string, len(list))
		for i, e := range list {
			parts[i] = fmt.Sprint(e)
		}
		return strings.Join(parts, ",")
	}
	return fmt.Sprint(v)
}

// lineOf finds the line that sets key.
func lineOf(text, key string) int {
	for i, l := range strings.Split(text, "\n") {
		if k, _, ok := strings.Cut(l, "="); ok && strings.Trim(strings.TrimSpace(k), `"'`) == key {
			return i + 1
		}
	}
	return 0
}

// nearest suggests a known key that shares a prefix or contains the wrong one.
func nearest(key string, known map[string]bool) string {
	best, score := "", 2
	for k := range known {
		n := 0
		for n < len(k) && n < len(key) && k[n] == key[n] {
			n++
		}
		if n > score || n == score && k < best {
			best, score = k, n
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf("; did you mean %q?", best)
}

// check looks at what no single setting can know.
func (c *Config) check() error {
	for _, r := range c.Roles {
		if r != "controller" && r != "node" && r != "gateway" {
			return fmt.Errorf("role %q: want controller, node or gateway: %w", r, atoll.ErrInvalid)
		}
	}
	if len(c.Roles) == 0 {
		return fmt.Errorf("no role: want at least one of controller, node, gateway: %w", atoll.ErrInvalid)
	}
	for name, addr := range map[string]string{"listen": c.Listen, "nbd": c.NBD} {
		if addr == "" || addr == "none" {
			continue
		}
		if _, _, err := net.SplitHostPort(addr); err != nil {
			return fmt.Errorf("setting %s = %q: want host:port: %w", name, addr, atoll.ErrInvalid)
		}
	}
	if host, _, err := net.SplitHostPort(c.Listen); err == nil && c.Advertise == "" {
		if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
			return fmt.Errorf("setting listen = %q is every address of this machine: say with --advertise which one others reach it by: %w", c.Listen, atoll.ErrInvalid)
		}
	}
	if c.NBD != "none" && c.NBD != "" && !loopback(c.NBD) && (c.TLSCert == "" || c.TLSKey == "" || c.TLSCA == "") {
		return fmt.Errorf("setting nbd = %q goes beyond loopback: that needs --nbd-tls-cert, --nbd-tls-key and --nbd-tls-ca, so that clients prove who they are: %w", c.NBD, atoll.ErrDenied)
	}
	if (c.TLSCert == "") != (c.TLSKey == "") {
		return fmt.Errorf("--nbd-tls-cert and --nbd-tls-key go together: %w", atoll.ErrInvalid)
	}
	if c.Memory < 64<<20 {
		return fmt.Errorf("setting memory = %s: want at least 64M: %w", atoll.FormatSize(c.Memory), atoll.ErrInvalid)
	}
	if c.Join != "" && c.Token == "" {
		if _, err := os.Stat(filepath.Join(c.Data, memberFile)); err != nil {
			return fmt.Errorf(`--join needs --token the first time; make one there with "atoll token create": %w`, atoll.ErrInvalid)
		}
	}
	if c.CurveAuth != "" && c.CurveAuth != "trust" && c.CurveAuth != "strict" {
		return fmt.Errorf("setting curve-auth = %q: want trust or strict: %w", c.CurveAuth, atoll.ErrInvalid)
	}
	if c.CurveSizes != "curve" && c.CurveSizes != "any" {
		return fmt.Errorf("setting curve-sizes = %q: want curve or any: %w", c.CurveSizes, atoll.ErrInvalid)
	}
	if c.LogFormat != "text" && c.LogFormat != "json" {
		return fmt.Errorf("setting log-format = %q: want text or json: %w", c.LogFormat, atoll.ErrInvalid)
	}
	return nil
}

// loopback reports whether addr can be reached from this machine only.
func loopback(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return false
	}
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// reach is addr as others reach it: with the advertised host.
func (c *Config) reach(addr string) string {
	_, port, err := net.SplitHostPort(addr)
	if c.Advertise == "" || err != nil {
		return addr
	}
	return net.JoinHostPort(c.Advertise, port)
}

// has reports whether the server has the role.
func (c *Config) has(role string) bool {
	for _, r := range c.Roles {
		if r == role {
			return true
		}
	}
	return false
}

// Procs returns the GOMAXPROCS to run with: twice the cores and at least four,
// because goroutines in short blocking system calls hold on to their processor
// and would starve those that fill the next batch.
func Procs() int { return max(4, 2*runtime.NumCPU()) }

// DemoConfig is the configuration of "atoll demo": nodes directories under dir,
// each with its limit.
func DemoConfig(dir string, nodes int, listen, nbdAddr, limit string) (*Config, error) {
	c := &Config{origins: map[string]string{}, nodes: nodes}
	set := map[string]string{"data": dir, "listen": listen, "nbd": nbdAddr, "disk-limit": limit, "spare": "1", "memory": "512M"}
	for _, s := range settings() {
		value, origin := s.def, "default"
		if v, ok := set[s.key]; ok {
			value, origin = v, "demo"
		}
		if err := s.set(c, value); err != nil {
			return nil, fmt.Errorf("demo: %s = %q: %w", s.key, value, err)
		}
		c.origins[s.key] = origin
	}
	// Later demos find the nodes that were added to earlier ones.
	for ; ; c.nodes++ {
		if _, err := os.Stat(filepath.Join(dir, "disks", strconv.Itoa(c.nodes+1))); err != nil {
			return c, c.check()
		}
	}
}
