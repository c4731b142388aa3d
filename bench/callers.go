package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/atollstore/atoll/internal/gateway/nbd"
	"github.com/atollstore/atoll/internal/host"
)

// callArea is the part of the volume that calls read and write, in bytes.
const callArea = 64 << 20

//go:embed calls/calls.py
var callsPython string

//go:embed calls/calls.c
var callsC string

// callers measure single calls of 4 KiB, one after the other. Each returns the
// median time of a call in microseconds.
type callers struct {
	language string // of plain
	plain    func(ctx context.Context, op string, count int) (float64, error)
	python   func(ctx context.Context, op string, count int) (float64, error)
}

// callers prepares a program in C with libnbd, or without a compiler and the
// library this program's own client, and a script for Python.
func (b *versionsBench) callers(ctx context.Context, c *cluster) (*callers, error) {
	dir := filepath.Join(b.dir, "calls")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make %s: %w", dir, err)
	}
	conf, script := filepath.Join(dir, "client.conf"), filepath.Join(dir, "calls.py")
	err := errors.Join(
		os.WriteFile(conf, []byte("mds.listen.addr="+c.api()+"\n"), 0o600),
		os.WriteFile(script, []byte(callsPython), 0o600),
		c.run(ctx, "python", "--env", "--dir", dir))
	if err != nil {
		return nil, err
	}
	k := &callers{language: "C"}
	k.python = func(ctx context.Context, op string, count int) (float64, error) {
		return output(ctx, "python3", script, conf, "/disk", op, strconv.Itoa(count), strconv.Itoa(callArea))
	}
	prog, err := compile(ctx, dir)
	if err != nil {
		b.tell("no program in C (%v): Go stands in", err)
		k.language = "Go"
		k.plain = func(ctx context.Context, op string, count int) (float64, error) { return callsGo(ctx, c, op, count) }
		return k, nil
	}
	k.plain = func(ctx context.Context, op string, count int) (float64, error) {
		return output(ctx, prog, c.uri("disk"), op, strconv.Itoa(count), strconv.Itoa(callArea))
	}
	return k, nil
}

// compile makes the program in C. It declares what it uses of libnbd itself, so
// the library is enough.
func compile(ctx context.Context, dir string) (string, error) {
	libs, err := filepath.Glob("/usr/lib*/*/libnbd.so.0")
	if err != nil || len(libs) == 0 {
		return "", errors.New("libnbd is not there")
	}
	src, prog := filepath.Join(dir, "calls.c"), filepath.Join(dir, "calls")
	if err := os.WriteFile(src, []byte(callsC), 0o600); err != nil {
		return "", err
	}
	if out, err := exec.CommandContext(ctx, "cc", "-O2", "-o", prog, src, libs[0]).CombinedOutput(); err != nil {
		return "", fmt.Errorf("cc: %w: %s", err, out)
	}
	return prog, nil
}

// output runs a program that prints one number.
func output(ctx context.Context, name string, args ...string) (float64, error) {
	var text strings.Builder
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stderr = &text
	out, err := cmd.Output()
	if err != nil {
		return 0, fmt.Errorf("%s: %w: %s", filepath.Base(args[0]), err, text.String())
	}
	return strconv.ParseFloat(strings.TrimSpace(string(out)), 64)
}

// callsGo is the program in C once more.
func callsGo(ctx context.Context, c *cluster, op string, count int) (float64, error) {
	vol, err := nbd.Dial(ctx, c.uri("disk"), nbd.DialOptions{NoStructured: true})
	if err != nil {
		return 0, err
	}
	defer vol.Close()
	b := host.Alloc(page)
	defer b.Release()
	var took []float64
	for range count {
		off := mathrand.Int64N(callArea/page) * page
		start := time.Now()
		if op == "read" {
			err = vol.ReadAt(ctx, b.Bytes(), off)
		} else {
			err = vol.WriteAt(ctx, b.Bytes(), off, true)
		}
		if err != nil {
			return 0, err
		}
		took = append(took, float64(time.Since(start))/1e3)
	}
	return middle(took), nil
}
