package demo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/cli"
	"github.com/atollstore/atoll/internal/transfer"
)

// tourist plays the tour and keeps what the summary tells.
type tourist struct {
	o       *Options
	dir     string
	api     *api.Client
	app     *cli.App
	summary [][2]string
	step    int
}

// tour does the main job on real data: image, import, use over NBD, kill a node
// under load, bring it back, export, compare.
func tour(ctx context.Context, o *Options, dir string, c *api.Client) error {
	t := &tourist{o: o, dir: dir, api: c, app: &cli.App{Out: o.Out, Err: o.Err}}
	start := time.Now()
	image, sum, err := t.makeImage(ctx)
	if err != nil {
		return err
	}
	defer os.Remove(image)
	if err := t.importImage(ctx, image); err != nil {
		return err
	}
	if err := t.history(ctx); err != nil {
		return err
	}
	if err := t.breakNode(ctx); err != nil {
		return err
	}
	if err := t.exportImage(ctx, sum); err != nil {
		return err
	}
	t.note("whole tour", fmt.Sprintf("%.0f s", time.Since(start).Seconds()))
	t.printSummary()
	return nil
}

// say announces a step.
func (t *tourist) say(format string, args ...any) {
	t.step++
	fmt.Fprintf(t.o.Out, "\n%d. %s\n", t.step, fmt.Sprintf(format, args...))
}

func (t *tourist) tell(format string, args ...any) {
	fmt.Fprintf(t.o.Out, "   "+format+"\n", args...)
}

func (t *tourist) note(what, value string) { t.summary = append(t.summary, [2]string{what, value}) }

// makeImage makes a disk image from the Go sources: an ext4 file system where
// mkfs is at hand, else a raw concatenation of the files.
func (t *tourist) makeImage(ctx context.Context) (path, sum string, err error) {
	src := t.o.Source
	if src == "" {
		src = filepath.Join(goroot(ctx), "src")
	}
	path = filepath.Join(t.dir, "image.img")
	_ = os.Remove(path) // of an interrupted tour
	kind := "ext4 image"
	mkfs := findTool("mkfs.ext4", "mke2fs")
	if mkfs == "" {
		kind = "image"
		t.say("Make a disk image of %s (no mkfs.ext4 here: its files one after another)", src)
		err = concatenate(src, path)
	} else {
		t.say("Make a disk image: ext4 holding %s", src)
		var size int64
		if size, err = treeSize(src); err == nil {
			var out []byte
			blocks := fmt.Sprintf("%dM", size*14/10>>20+64)
			out, err = exec.CommandContext(ctx, mkfs, "-q", "-t", "ext4", "-d", src, path, blocks).CombinedOutput()
			if err != nil {
				err = fmt.Errorf("%s: %v: %s", mkfs, err, strings.TrimSpace(string(out)))
			}
		}
	}
	if err != nil {
		return "", "", fmt.Errorf("make image: %w", err)
	}
	sum, size, err := checksum(path)
	if err != nil {
		return "", "", err
	}
	t.tell("%s of %s, SHA-256 %s…", kind, cli.FormatSize(size), sum[:16])
	t.note("image", fmt.Sprintf("%s of %s", cli.FormatSize(size), src))
	return path, sum, nil
}

// goroot finds the Go sources: the data that every machine with Go has.
func goroot(ctx context.Context) string {
	if out, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output(); err == nil && len(out) > 1 {
		return strings.TrimSpace(string(out))
	}
	//lint:ignore SA1019 a guess is better than none
	return runtime.GOROOT()
}

// findTool looks for programs also where root's live.
func findTool(names ...string) string {
	for _, n := range names {
		if p, err := exec.LookPath(n); err == nil {
			return p
		}
		for _, d := range []string{"/usr/sbin", "/sbin"} {
			if _, err := os.Stat(filepath.Join(d, n)); err == nil {
				return filepath.Join(d, n)
			}
		}
	}
	return ""
}

// treeSize adds up the room that files take in whole blocks.
func treeSize(root string) (n int64, err error) {
	err = filepath.Walk(root, func(_ string, info os.FileInfo, err error) error {
		if err == nil {
			n += (info.Size()+4095)&^4095 + 512
		}
		return err
	})
	return n, err
}

func concatenate(root, path string) error {
	out, err := os.Create(path)
	if err != nil {
		return err
	}
	werr := filepath.Walk(root, func(p string, info os.FileInfo, err error) error {
		if err != nil || !info.Mode().IsRegular() {
			return err
		}
		f, err := os.Open(p)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(out, f)
		return err
	})
	st, serr := out.Stat()
	if serr == nil {
		serr = out.Truncate((st.Size() + 4095) &^ 4095)
	}
	return errors.Join(werr, serr, out.Close())
}

func checksum(path string) (sum string, size int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	h := sha256.New()
	size, err = io.Copy(h, f)
	return hex.EncodeToString(h.Sum(nil)), size, err
}

const tourVolume, tourLoad, tourClone = "tour", "tour-load", "tour-clone"

// create makes a volume and connects to it.
func (t *tourist) create(ctx context.Context, name string, size int64) (*transfer.NBD, error) {
	_, err := t.api.Volumes.CreateVolume(ctx, connect.NewRequest(&atollv1.CreateVolumeRequest{Name: name, SizeBytes: size}))
	if errors.Is(err, atoll.ErrExist) { // of an earlier tour
		if _, err = t.api.Volumes.DeleteVolume(ctx, connect.NewRequest(&atollv1.DeleteVolumeRequest{Name: name, Now: true})); err == nil {
			return t.create(ctx, name, size)
		}
	}
	if err != nil {
		return nil, err
	}
	return t.open(ctx, name)
}

func (t *tourist) open(ctx context.Context, name string) (*transfer.NBD, error) {
	v, err := t.api.Volumes.GetVolume(ctx, connect.NewRequest(&atollv1.GetVolumeRequest{Name: name}))
	if err != nil {
		return nil, err
	}
	return transfer.OpenNBD(ctx, v.Msg.Urls[0], 2)
}

// importImage copies the image into a volume and reads some of it back.
func (t *tourist) importImage(ctx context.Context, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	t.say("Import it into a volume with three copies   (atoll volume import image.img %s)", tourVolume)
	d, err := t.create(ctx, tourVolume, (st.Size()+4095)&^4095)
	if err != nil {
		return err
	}
	defer d.Close()
	p := t.app.NewProgress("   import", st.Size())
	start := time.Now()
	res, err := transfer.Import(ctx, d, f, st.Size(), transfer.Options{Progress: p.Add, DestIsZero: true})
	p.Done()
	if err != nil {
		return err
	}
	rate := cli.FormatSize(int64(float64(res.Bytes) / time.Since(start).Seconds()))
	t.tell("%s of data, durable on three nodes, at %s/s", cli.FormatSize(res.Data), rate)
	t.note("import", rate+"/s, on stable storage on 3 nodes")
	return nil
}

// wreckBytes is how much of the volume the tour destroys.
const wreckBytes = 64 << 20

// history backs the volume up, destroys a part of it, clones the backup, and
// goes back to it; the export at the end of the tour shows that all is there.
func (t *tourist) history(ctx context.Context) error {
	t.say("Back it up, wreck it, clone the backup, go back to it   (atoll volume backup, clone, restore)")
	took := func(what string, call func() error) (string, error) {
		start := time.Now()
		if err := call(); err != nil {
			return "", fmt.Errorf("%s: %w", what, err)
		}
		return fmt.Sprintf("%.1f ms", float64(time.Since(start).Microseconds())/1000), nil
	}
	backup, err := took("backup", func() error {
		_, err := t.api.Versions.CreateVersion(ctx, connect.NewRequest(&atollv1.CreateVersionRequest{Media: []string{tourVolume}, Name: "clean"}))
		return err
	})
	if err != nil {
		return err
	}
	if err := t.wreck(ctx); err != nil {
		return err
	}
	clone, err := took("clone", func() error {
		_, err := t.api.Versions.CloneVersion(ctx, connect.NewRequest(&atollv1.CloneVersionRequest{Source: tourVolume + "@clean", Name: tourClone}))
		return err
	})
	if err != nil {
		return err
	}
	restore, err := took("restore", func() error {
		_, err := t.api.Versions.RestoreVersion(ctx, connect.NewRequest(&atollv1.RestoreVersionRequest{Name: tourVolume + "@clean"}))
		return err
	})
	if err != nil {
		return err
	}
	t.tell("backup %s, clone %s, restore %s; %s overwritten in between", backup, clone, restore, cli.FormatSize(wreckBytes))
	t.note("backup, clone, restore", fmt.Sprintf("%s, %s, %s: nothing is copied", backup, clone, restore))
	return nil
}

// wreck overwrites the beginning of the volume.
func (t *tourist) wreck(ctx context.Context) error {
	d, err := t.open(ctx, tourVolume)
	if err != nil {
		return err
	}
	defer d.Close()
	junk := bytes.Repeat([]byte("wreckage"), 1<<17)
	for off := int64(0); off < min(wreckBytes, d.Size()); off += int64(len(junk)) {
		n := min(int64(len(junk)), d.Size()-off)
		if err := d.WriteAt(ctx, junk[:n], off); err != nil {
			return fmt.Errorf("wreck: %w", err)
		}
	}
	return nil
}

// breakNode kills a node while a load runs, and brings it back.
func (t *tourist) breakNode(ctx context.Context) error {
	t.say("Write and read another volume over NBD, every write durable, every read checked")
	d, err := t.create(ctx, tourLoad, 256<<20)
	if err != nil {
		return err
	}
	size := d.Size()
	if err := d.Close(); err != nil {
		return err
	}
	l := startLoad(ctx, size, func(ctx context.Context) (*transfer.NBD, error) { return t.open(ctx, tourLoad) })
	defer l.close()
	defer l.stop()
	if err := rest(ctx, 2*time.Second); err != nil {
		return err
	}
	t.tell("%d operations in 2 s", l.ops.Load())
	node, err := t.victim(ctx)
	if err != nil {
		return err
	}
	t.say("Kill node %d under that load   (atoll demo kill %d)", node, node)
	l.resetStall()
	before, lost := l.ops.Load(), l.lost.Load()
	if err := t.inject(ctx, node, "kill"); err != nil {
		return err
	}
	if err := rest(ctx, 3*time.Second); err != nil {
		return err
	}
	stall := l.longestStall()
	seen := "no error"
	if n := l.lost.Load() - lost; n > 0 { // the machine stalled for longer than a lease lasts
		seen = fmt.Sprintf("connections made again: %d", n)
	}
	t.tell("%d operations in the 3 s after it, %s; the longest stall was %.0f ms", l.ops.Load()-before, seen, float64(stall.Microseconds())/1000)
	t.note("node killed under load", fmt.Sprintf("longest stall %.0f ms, %s", float64(stall.Microseconds())/1000, seen))
	t.say("Bring it back   (atoll demo revive %d)", node)
	if err := t.inject(ctx, node, "revive"); err != nil {
		return err
	}
	if err := rest(ctx, time.Second); err != nil {
		return err
	}
	if err := l.stop(); err != nil {
		return fmt.Errorf("load: %w", err)
	}
	ops := l.ops.Load()
	blocks, err := l.verify(ctx)
	if err != nil {
		return err
	}
	t.tell("%d operations in all; all %d blocks read back as last written", ops, blocks)
	t.note("operations checked", fmt.Sprintf("%d, and %d blocks read back: all right", ops, blocks))
	return t.settled(ctx)
}

// victim picks the node with the most segments.
func (t *tourist) victim(ctx context.Context) (uint32, error) {
	r, err := t.api.Cluster.ListNodes(ctx, connect.NewRequest(&atollv1.ListNodesRequest{}))
	if err != nil {
		return 0, err
	}
	var best *atollv1.Node
	for _, n := range r.Msg.Nodes {
		if n.Up && (best == nil || n.OpenSegments > best.OpenSegments || n.OpenSegments == best.OpenSegments && n.Segments > best.Segments) {
			best = n
		}
	}
	if best == nil {
		return 0, fmt.Errorf("no node is up: %w", atoll.ErrUnavailable)
	}
	return best.Id, nil
}

func (t *tourist) inject(ctx context.Context, node uint32, fault string) error {
	r, err := t.api.Demo.Inject(ctx, connect.NewRequest(&atollv1.InjectRequest{Node: node, Fault: fault, Delay: durationpb.New(0)}))
	if err == nil {
		t.tell("%s", r.Msg.Message)
	}
	return err
}

// settled waits until no segment lacks a verified copy.
func (t *tourist) settled(ctx context.Context) error {
	start := time.Now()
	for {
		short := int32(0)
		for _, name := range []string{tourVolume, tourLoad} {
			v, err := t.api.Volumes.GetVolume(ctx, connect.NewRequest(&atollv1.GetVolumeRequest{Name: name}))
			if err != nil {
				return err
			}
			short += v.Msg.GetShortSegments()
		}
		if short == 0 {
			t.tell("every segment has its three copies again")
			return nil
		}
		if time.Since(start) > 30*time.Second {
			t.tell("%d segments still miss a copy", short)
			return nil
		}
		if err := rest(ctx, 200*time.Millisecond); err != nil {
			return err
		}
	}
}

// exportImage reads the first volume back and compares.
func (t *tourist) exportImage(ctx context.Context, want string) error {
	t.say("Export the image and compare   (atoll volume export %s back.img)", tourVolume)
	d, err := t.open(ctx, tourVolume)
	if err != nil {
		return err
	}
	defer d.Close()
	path := filepath.Join(t.dir, "back.img")
	_ = os.Remove(path)
	defer os.Remove(path)
	p := t.app.NewProgress("   export", d.Size())
	start := time.Now()
	res, err := transfer.ExportFile(ctx, d, path, transfer.Options{Progress: p.Add})
	p.Done()
	if err != nil {
		return err
	}
	rate := cli.FormatSize(int64(float64(res.Bytes) / time.Since(start).Seconds()))
	got, _, err := checksum(path)
	if err != nil {
		return err
	}
	if got != want {
		return fmt.Errorf("the exported image has SHA-256 %s, the original %s: %w", got, want, atoll.ErrCorrupt)
	}
	t.tell("SHA-256 %s…: the same, byte for byte", got[:16])
	t.note("export", rate+"/s, SHA-256 equal to the original's")
	return nil
}

// printSummary is what a person remembers.
func (t *tourist) printSummary() {
	width := 0
	for _, s := range t.summary {
		width = max(width, len(s[0]))
	}
	fmt.Fprintf(t.o.Out, "\n── What happened %s\n", strings.Repeat("─", 48))
	for _, s := range t.summary {
		fmt.Fprintf(t.o.Out, "   %-*s   %s\n", width, s[0], s[1])
	}
	fmt.Fprintf(t.o.Out, "   %-*s   %s\n", width, "this machine", fmt.Sprintf("%d cores; %d nodes in one process on one disk", runtime.NumCPU(), t.o.Nodes))
	fmt.Fprintf(t.o.Out, "%s\n   Now play with it yourself: bin/atoll demo\n", strings.Repeat("─", 65))
}

// rest waits.
func rest(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
