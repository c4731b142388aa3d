package stream

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/wire"
)

// The scripts in testdata are blocks of commands, "----", and what came of them,
// with empty lines between. With -rewrite the outcome is written into them.

var rewrite = flag.Bool("rewrite", false, "write the outcome into the scripts")

// runScript feeds every block of commands to exec and compares the outcomes.
func runScript(t *testing.T, name string, exec func(line string) []string) {
	raw, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	var block []string
	skip := false
	sc := bufio.NewScanner(strings.NewReader(string(raw)))
	for sc.Scan() {
		line := sc.Text()
		switch {
		case line == "":
			skip = false
		case line == "----":
			skip = true
			out.WriteString("----\n")
			for _, cmd := range block {
				for _, l := range exec(cmd) {
					out.WriteString(l + "\n")
				}
			}
			block = nil
			continue
		case skip:
			continue
		case !strings.HasPrefix(line, "#"):
			block = append(block, line)
		}
		out.WriteString(line + "\n")
	}
	if *rewrite {
		if err := os.WriteFile(name, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if out.String() != string(raw) {
		t.Errorf("%s: outcome differs; -rewrite takes it over:\n%s", name, out.String())
	}
}

func TestScripts(t *testing.T) {
	names, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(names) == 0 {
		t.Fatal("no scripts", err)
	}
	for _, name := range names {
		t.Run(filepath.Base(name), func(t *testing.T) {
			if strings.HasPrefix(filepath.Base(name), "recover") {
				runScript(t, name, (&recoverScript{}).exec)
			} else {
				runScript(t, name, newWriterScript().exec)
			}
		})
	}
}

// writerScript drives a writer core by words.
type writerScript struct {
	core  *writerCore
	now   time.Duration
	valid bool
}

func newWriterScript() *writerScript {
	return &writerScript{valid: true, core: newWriterCore(coreConfig{
		timeout: 10 * time.Second, soft: 50 * time.Millisecond, hard: 250 * time.Millisecond, silent: time.Second,
		idle: 30 * time.Second, retry: 10 * time.Millisecond, retryMax: time.Second, pipe: 16, copies: 3,
	})}
}

var errKinds = map[string]error{
	"unreachable": atoll.ErrUnreachable, "nospace": atoll.ErrNoSpace, "fenced": atoll.ErrFenced, "io": atoll.ErrIO,
	"sealed": atoll.ErrSealed, "unavailable": atoll.ErrUnavailable, "exist": atoll.ErrExist, "gap": atoll.ErrGap,
}

func kindName(err error) string {
	for _, kind := range atoll.Kinds() {
		if errors.Is(err, kind) {
			return kind.Error()
		}
	}
	return err.Error()
}

func nodeList(s string) (ids []atoll.NodeID) {
	for _, f := range strings.Split(s, ",") {
		n, _ := strconv.Atoi(f)
		ids = append(ids, atoll.NodeID(n))
	}
	return ids
}

// exec carries out one command:
//
//	entry RECORDS BLOCKS | registered SEG NODES SIZE | register-fails SEG ERR
//	created SEG COPY | create-fails SEG COPY ERR | ok BATCH COPY… | fails BATCH COPY ERR
//	sealed SEG [FAILED COPY…] | recorded SEG | record-fails SEG ERR | roll | close
//	after DURATION (in ticks of 10 ms) | sleep DURATION (no tick meanwhile) | lease on|off
func (s *writerScript) exec(line string) (out []string) {
	f := strings.Fields(line)
	num := func(i int) int { n, _ := strconv.Atoi(f[i]); return n }
	step := func(ev event) {
		ev.now, ev.valid = s.now, s.valid
		out = append(out, s.show(s.core.step(ev))...)
	}
	switch f[0] {
	case "entry":
		step(event{kind: evEntry, recs: num(1), block: num(2)})
	case "registered":
		step(event{kind: evRegistered, seg: segNo(num(1)), nodes: nodeList(f[2]), size: atoll.BlockNo(num(3)), id: atoll.SegmentID{Ordinal: atoll.Ordinal(num(1))}})
	case "register-fails":
		step(event{kind: evRegistered, seg: segNo(num(1)), err: errKinds[f[2]]})
	case "created":
		for i := range f[2:] {
			step(event{kind: evCreated, seg: segNo(num(1)), copy: num(2 + i)})
		}
	case "create-fails":
		step(event{kind: evCreated, seg: segNo(num(1)), copy: num(2), err: errKinds[f[3]]})
	case "ok":
		for i := range f[2:] {
			step(event{kind: evAnswer, batch: uint64(num(1)), copy: num(2 + i)})
		}
	case "fails":
		step(event{kind: evAnswer, batch: uint64(num(1)), copy: num(2), err: errKinds[f[3]]})
	case "sealed":
		mask := uint8(0)
		for i := range f[2:] {
			mask |= 1 << num(2+i)
		}
		step(event{kind: evNodesSealed, seg: segNo(num(1)), mask: mask})
	case "recorded":
		step(event{kind: evRecorded, seg: segNo(num(1))})
	case "record-fails":
		step(event{kind: evRecorded, seg: segNo(num(1)), err: errKinds[f[2]]})
	case "roll":
		step(event{kind: evRoll})
	case "close":
		step(event{kind: evClose})
	case "lease":
		s.valid = f[1] == "on"
	case "sleep":
		d, _ := time.ParseDuration(f[1])
		s.now += d
		step(event{kind: evTick})
	case "after":
		d, _ := time.ParseDuration(f[1])
		for end := s.now + d; s.now < end; {
			s.now += 10 * time.Millisecond
			before := len(out)
			if step(event{kind: evTick}); len(out) > before {
				out = append(out[:before:before], append([]string{fmt.Sprintf("at %v:", s.now)}, out[before:]...)...)
			}
		}
	default:
		out = append(out, "unknown command")
	}
	return out
}

func maskCopies(mask uint8) (list []int) {
	for i := range 8 {
		if mask&(1<<i) != 0 {
			list = append(list, i)
		}
	}
	return list
}

func (s *writerScript) show(fx []effect) (out []string) {
	for _, e := range fx {
		var l string
		switch e.kind {
		case fxRegister:
			l = fmt.Sprintf("register segment %d", e.seg)
		case fxCreate:
			l = fmt.Sprintf("create segment %d, copy %d", e.seg, e.copy)
		case fxSend:
			l = fmt.Sprintf("send batch %d to segment %d at %d: entries %d to %d (acknowledged up to %d)", e.batch, e.seg, e.at, e.first, e.first+uint64(e.n)-1, e.acked)
		case fxAck:
			l = fmt.Sprintf("acknowledge entries %d to %d", e.first, e.first+uint64(e.n)-1)
		case fxFail:
			l = fmt.Sprintf("fail entries %d to %d: %s", e.first, e.first+uint64(e.n)-1, kindName(e.err))
		case fxSuspect:
			l = fmt.Sprintf("suspect node %d: %s", e.node, kindName(e.err))
		case fxSealNodes:
			l = fmt.Sprintf("seal the copies of segment %d at %d but for %v", e.seg, e.at, maskCopies(e.mask))
		case fxRecord:
			l = fmt.Sprintf("record segment %d sealed at %d, unverified %v", e.seg, e.at, maskCopies(e.mask))
		case fxAbandon:
			l = fmt.Sprintf("abandon segment %d", e.seg)
		case fxRolled:
			l = "rolled"
		case fxStopped:
			l = "stop: " + kindName(e.err)
		}
		out = append(out, l)
	}
	return out
}

// recoverScript drives a recover core by words.
type recoverScript struct{ core recoverCore }

// exec carries out one command:
//
//	segment on NODES | node ID GRADE LENGTH [sealed] [sum=N] | node ID fails | waited
//	done ID… (completed and sealed) | failed ID | conclude
func (s *recoverScript) exec(line string) []string {
	f := strings.Fields(line)
	index := func(id string) int {
		n, _ := strconv.Atoi(id)
		return slices.Index(s.core.nodes, atoll.NodeID(n))
	}
	switch f[0] {
	case "segment":
		s.core = recoverCore{nodes: nodeList(f[2])}
		return nil
	case "node":
		if f[2] == "fails" {
			s.core.failed(index(f[1]), atoll.ErrUnreachable)
			break
		}
		n, _ := strconv.Atoi(f[3])
		t := wire.Tail{Length: atoll.BlockNo(n), Sum: uint32(n), Sealed: slices.Contains(f, "sealed")}
		if slices.Contains(f, "other") {
			t.Sum++
		}
		for t.Grade.String() != f[2] {
			t.Grade++
		}
		s.core.answered(index(f[1]), t)
	case "waited":
		s.core.waited = true
	case "done":
		for _, id := range f[1:] {
			s.core.copies[index(id)].state = copySealed
		}
		return nil
	case "failed":
		s.core.failed(index(f[1]), atoll.ErrUnreachable)
		return nil
	case "conclude":
		unverified, err := s.core.conclude()
		if err != nil {
			return []string{err.Error()}
		}
		return []string{fmt.Sprintf("seal at %d, unverified %v", s.core.length, unverified)}
	}
	return s.show()
}

func (s *recoverScript) show() []string {
	ok, err := s.core.decide()
	switch {
	case err != nil:
		return []string{err.Error()}
	case !ok:
		return []string{"wait"}
	}
	out := []string{fmt.Sprintf("length %d, from node %v", s.core.length, s.core.nodes[s.core.source])}
	for _, i := range s.core.targets() {
		if s.core.short(i) {
			out = append(out, fmt.Sprintf("complete node %v from %d", s.core.nodes[i], s.core.lengthOf(i)))
		}
	}
	return out
}
