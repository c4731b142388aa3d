package node

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/host/hosttest"
	"github.com/atollstore/atoll/internal/wire"
)

var rewrite = flag.Bool("rewrite", false, "write the scripts' outputs anew")

// TestScripts runs testdata/*.txt. A script is a list of commands, one a line,
// each followed by its output up to an empty line. Lines that begin with # are
// for the reader. Two nodes, a and b, stand ready; a command goes to node a
// unless it says node=b.
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	must(t, err)
	if len(files) == 0 {
		t.Fatal("no scripts")
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			in, err := os.ReadFile(file)
			must(t, err)
			out := newScript(t).run(string(in))
			if *rewrite {
				must(t, os.WriteFile(file, []byte(out), 0o644))
			} else if out != string(in) {
				t.Errorf("%s: output differs; it is now:\n%s", file, out)
			}
		})
	}
}

type script struct {
	t       *testing.T
	disks   map[string]*hosttest.Disk
	nodes   map[string]*Node
	writers map[int]*writer
	sent    map[int][]*wire.Append
	options Options
}

func newScript(t *testing.T) *script {
	s := &script{
		t: t, disks: make(map[string]*hosttest.Disk), nodes: make(map[string]*Node),
		writers: make(map[int]*writer), sent: make(map[int][]*wire.Append),
	}
	for i, name := range []string{"a", "b"} {
		d := hosttest.NewDisk(uint64(i))
		must(t, Format(d, Identity{Cluster: testCluster, Node: atoll.NodeID(i + 1), Disk: atoll.UUID{byte(i)}, Incarnation: atoll.UUID{9}}))
		s.disks[name] = d
		s.open(name)
	}
	t.Cleanup(func() { s.nodes["a"].Abort(); s.nodes["b"].Abort() })
	return s
}

func (s *script) open(name string) {
	o := s.options
	o.FS, o.Cluster, o.NoPrewrite = s.disks[name], testCluster, true
	n, err := Open(o)
	must(s.t, err)
	s.nodes[name] = n
}

// run returns the script with its outputs as they are now.
func (s *script) run(in string) string {
	var out strings.Builder
	skip := false
	for line := range strings.Lines(in) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "#"):
			out.WriteString(line + "\n")
		case line == "":
			skip = false
		case !skip:
			fmt.Fprintf(&out, "%s\n%s\n", line, s.command(line))
			skip = true
		}
		if line == "" {
			out.WriteString("\n")
		}
	}
	return out.String()
}

// args are the parts of a command after its name.
type args map[string]string

func (a args) num(key string, def int) int {
	v, ok := a[key]
	if !ok {
		return def
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		panic(err)
	}
	return n
}

func (s *script) command(line string) string {
	words := strings.Fields(line)
	a := args{"node": "a"}
	for _, w := range words[1:] {
		k, v, _ := strings.Cut(w, "=")
		a[k] = v
	}
	out, err := s.do(words[0], a)
	if err != nil {
		return err.Error()
	}
	if out == "" {
		return "ok"
	}
	return strings.TrimSuffix(out, "\n")
}

func (s *script) do(verb string, a args) (string, error) {
	n, d := s.nodes[a["node"]], s.disks[a["node"]]
	ord := a.num("seg", 1)
	id := testSeg(ord)
	epoch := atoll.Epoch(a.num("epoch", 1))
	at := atoll.BlockNo(a.num("block", 0))
	switch verb {
	case "create":
		if s.writers[ord] == nil {
			s.writers[ord] = newWriter(id, epoch)
		}
		return "", n.Create(bg(), id, epoch, atoll.BlockNo(a.num("blocks", 64)))
	case "append":
		return "", s.append(n, ord, a)
	case "fence":
		t, err := n.Fence(bg(), id, epoch)
		return fmt.Sprintf("%v length=%d sealed=%v epoch=%v seq=%d", t.Grade, t.Length, t.Sealed, t.Epoch, t.Seq), err
	case "seal":
		return "", n.Seal(bg(), id, epoch, atoll.BlockNo(a.num("length", 0)))
	case "delete":
		return "", n.Delete(bg(), id, epoch)
	case "discard":
		return "", n.Discard(bg(), id, []wire.Run{{Block: at, Blocks: atoll.BlockNo(a.num("n", 1))}})
	case "copy": // from the other node, as recovery does
		buf, err := s.other(a).Fetch(bg(), id, at, a.num("max", 1<<20))
		if err != nil {
			return "", err
		}
		defer buf.Release()
		return fmt.Sprintf("%d blocks", len(buf.Bytes())/atoll.BlockSize), n.Extend(bg(), id, epoch, at, buf.Bytes())
	case "repair": // with the bytes of the other node
		buf := host.Alloc(a.num("n", 1) * atoll.BlockSize)
		defer buf.Release()
		if err := s.other(a).Read(bg(), id, at, buf.Bytes()); err != nil {
			return "", err
		}
		return "", n.Repair(bg(), id, at, buf.Bytes())
	case "read":
		return s.read(n, id, at, a.num("n", 1))
	case "verify":
		r, err := n.Verify(bg(), id)
		return fmt.Sprintf("%d blocks, damaged %v", r.Blocks, r.Damaged), err
	case "list":
		return s.list(n)
	case "stat":
		st, err := n.Stat(bg())
		return fmt.Sprintf("segments=%d open=%d readonly=%v full=%v errors=%d", st.Segments, st.Open, st.ReadOnly, st.Full, st.Errors), err
	case "restart": // cleanly, or as after a power cut that kept or lost what was not synced
		return s.restart(a["node"], a)
	case "corrupt":
		return "", d.Corrupt(segmentPath(id), at.Bytes()+int64(a.num("byte", 100)), int64(a.num("bytes", 1)))
	case "damage":
		return "", d.Corrupt(a["file"], at.Bytes()+100, 1)
	case "remove":
		return "", errors.Join(d.Remove(segmentPath(id)), d.SyncDir(segmentsDir))
	case "disk":
		d.SetSize(int64(a.num("kib", 0)) << 10)
		return "", nil
	case "fault":
		d.Inject(host.Rule{Ops: faultOps[a["op"]], Path: a["path"], Err: faultErrs[a["err"]], Nth: a.num("nth", 0), Times: a.num("times", 0)})
		return "", nil
	case "heal":
		d.Heal()
		return "", nil
	}
	return "", fmt.Errorf("unknown command %s", verb)
}

var (
	faultOps  = map[string]host.Op{"write": host.OpWrite, "sync": host.OpSync, "read": host.OpRead, "create": host.OpCreate}
	faultErrs = map[string]error{"io": atoll.ErrIO, "nospace": atoll.ErrNoSpace}
)

func (s *script) other(a args) *Node {
	if a["node"] == "a" {
		return s.nodes["b"]
	}
	return s.nodes["a"]
}

// append builds count batches of n blocks, or repeats batch number again, and
// sends them, to both nodes with node=ab.
func (s *script) append(n *Node, ord int, a args) error {
	w := s.writers[ord]
	if w == nil {
		w = newWriter(testSeg(ord), epochOf(a))
		s.writers[ord] = w
	}
	w.epoch = atoll.Epoch(a.num("epoch", int(w.epoch)))
	w.acked = atoll.BlockNo(a.num("acked", int(w.acked)))
	var list []*wire.Append
	if again := a.num("again", -1); again >= 0 {
		list = append(list, s.sent[ord][again])
	} else {
		for range a.num("count", 1) {
			list = append(list, w.batch(a.num("n", 1)))
		}
		s.sent[ord] = append(s.sent[ord], list...)
	}
	if _, lost := a["lost"]; lost {
		return nil // on the way
	}
	if a["node"] == "ab" {
		return errors.Join(s.nodes["a"].appendAll(list), s.nodes["b"].appendAll(list))
	}
	return n.appendAll(list)
}

func epochOf(a args) atoll.Epoch { return atoll.Epoch(a.num("epoch", 1)) }

func (s *script) read(n *Node, id atoll.SegmentID, at atoll.BlockNo, count int) (string, error) {
	buf := host.Alloc(count * atoll.BlockSize)
	defer buf.Release()
	if err := n.Read(bg(), id, at, buf.Bytes()); err != nil {
		return "", err
	}
	var out strings.Builder
	for i := range count {
		p := buf.Bytes()[i*atoll.BlockSize:][:60]
		if end := strings.Index(string(p), "."); end > 0 && strings.HasPrefix(string(p), "segment") {
			fmt.Fprintln(&out, string(p[:end]))
		} else {
			fmt.Fprintf(&out, "% x\n", p[:4])
		}
	}
	return out.String(), nil
}

func (s *script) list(n *Node) (string, error) {
	var out strings.Builder
	list, err := n.List(bg(), atoll.SegmentID{}, 100)
	for _, i := range list {
		fmt.Fprintf(&out, "%d: length=%d size=%d sealed=%v damaged=%v epoch=%v\n", i.Seg.Ordinal, i.Length, i.Size, i.Sealed, i.Damaged, i.Epoch)
	}
	if len(list) == 0 {
		return "none", err
	}
	return out.String(), err
}

func (s *script) restart(name string, a args) (string, error) {
	n := s.nodes[name]
	switch a["how"] {
	case "kill":
		n.Abort()
	case "lose", "keep":
		mode := hosttest.LoseUnsynced
		if a["how"] == "keep" {
			mode = hosttest.KeepAll
		}
		s.disks[name] = s.disks[name].Crash(nil, mode)
		n.Abort()
	default:
		if err := n.Close(); err != nil {
			s.open(name)
			return "", err
		}
	}
	s.options.Limit = int64(a.num("limit", int(s.options.Limit)))
	s.open(name)
	return "", nil
}
