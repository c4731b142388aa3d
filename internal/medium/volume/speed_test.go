package volume

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/medium"
	storage "github.com/atollstore/atoll/internal/node"
	"github.com/atollstore/atoll/internal/stream"
	"github.com/atollstore/atoll/internal/wire"
)

// Measurements on a real disk, three nodes in one process and the catalog in
// memory:
//
//	go test ./internal/medium/volume -run Speed -v -speed DIR -written 10240
var (
	speedFlag   = flag.String("speed", "", "measure versions in a new directory of this one")
	writtenFlag = flag.Int64("written", 2048, "MiB to write before measuring")
)

// diskCluster is a process with three nodes on the file system.
type diskCluster struct {
	opts  medium.Options
	close func()
}

func newDiskCluster(t *testing.T, dir string, limit int64) *diskCluster {
	ctx := context.Background()
	mem := catalog.NewMemory(catalog.MemoryOptions{})
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	cat, err := catalog.Open(ctx, mem.Client("p"), log)
	no(t, err)
	_, err = cat.Init(ctx, catalog.Cluster{ID: atoll.UUID{1}})
	no(t, err)
	session, err := cat.OpenSession(ctx, catalog.Process{Host: "p"})
	no(t, err)
	nodes := stream.NewNodes(stream.NodesOptions{Catalog: cat, Seed: 1, Log: log, Dial: func(catalog.Node) wire.Node { return nil }})
	var list []*storage.Node
	committer := new(storage.Committer)
	report := func(id atoll.NodeID, n *storage.Node) {
		st, err := n.Stat(ctx)
		if err == nil {
			err = cat.ReportNode(ctx, session, id, catalog.NodeReport{Total: st.Total, Free: st.Free, Full: st.Full})
		}
		if err != nil {
			t.Error(err)
		}
	}
	var ids []atoll.NodeID
	for i := range 3 {
		path := filepath.Join(dir, fmt.Sprint("disk", i))
		no(t, os.MkdirAll(path, 0o700))
		fs, err := host.OpenDir(path)
		no(t, err)
		id := storage.Identity{Cluster: atoll.UUID{1}, Disk: atoll.UUID{2, byte(i)}, Incarnation: atoll.UUID{3, byte(i)}}
		no(t, storage.Format(fs, id))
		rec, err := cat.RegisterNode(ctx, session, catalog.Node{Disk: id.Disk, Incarnation: id.Incarnation, Addr: "-", Host: fmt.Sprint("h", i)})
		no(t, err)
		n, err := storage.Open(storage.Options{FS: fs, Cluster: atoll.UUID{1}, Node: rec.ID, SharedFlush: fs.WholeFlush(), Committer: committer, Limit: limit, Log: log})
		no(t, err)
		nodes.AddLocal(rec.ID, n)
		list, ids = append(list, n), append(ids, rec.ID)
		report(rec.ID, n)
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				for i, n := range list {
					report(ids[i], n)
				}
			}
		}
	})
	return &diskCluster{
		opts: medium.Options{Catalog: cat, Nodes: nodes, Session: session, Log: log, Grace: time.Second},
		close: func() {
			close(stop)
			wg.Wait()
			for _, n := range list {
				no(t, n.Close())
			}
			no(t, session.Close(ctx))
			no(t, cat.Close())
			no(t, mem.Close())
		},
	}
}

func (c *diskCluster) volume(t *testing.T, size int64, o Options) (*medium.Medium, *Volume) {
	rec, err := medium.Create(t.Context(), c.opts, catalog.Medium{Name: fmt.Sprint("v", size), Kind: catalog.KindVolume, Owner: "root", Size: size, Policy: catalog.Policy{Replicas: 3}})
	no(t, err)
	m, err := medium.Open(t.Context(), c.opts, rec.ID)
	no(t, err)
	return m, mustOpen(t, OnMedium(m), o)
}

// load writes 4 KiB pages at random places with a few writers until stop.
type load struct {
	v     *Volume
	pages int64 // places, spread over the volume in pieces of 64 MiB
	stop  chan struct{}
	wg    sync.WaitGroup
	count atomic.Int64
	worst atomic.Int64 // nanoseconds of the slowest write since it was asked for
}

func startLoad(t *testing.T, v *Volume, written int64, writers int) *load {
	l := &load{v: v, pages: written / atoll.BlockSize, stop: make(chan struct{})}
	for w := range writers {
		l.wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 1))
			b := page(uint64(w))
			defer b.Release()
			for {
				select {
				case <-l.stop:
					return
				default:
				}
				begun := time.Now()
				if err := v.Write(context.Background(), b, b.Bytes(), place(v, rng.Int64N(l.pages), l.pages), false); err != nil {
					t.Error(err)
					return
				}
				d := int64(time.Since(begun))
				for old := l.worst.Load(); d > old && !l.worst.CompareAndSwap(old, d); old = l.worst.Load() {
				}
				l.count.Add(1)
			}
		})
	}
	return l
}

func (l *load) end() {
	close(l.stop)
	l.wg.Wait()
}

// place spreads pages over the volume in pieces of 64 MiB.
func place(v *Volume, p, pages int64) int64 {
	const piece = 64 << 20 / atoll.BlockSize
	pieces := max(pages/piece, 1)
	step := v.Size() / atoll.BlockSize / pieces &^ 255
	return (p/piece*step + p%piece) % (v.Size() / atoll.BlockSize) * atoll.BlockSize
}

func fillVolume(t *testing.T, v *Volume, written int64) {
	buf := host.Alloc(1 << 20)
	defer buf.Release()
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range buf.Bytes() {
		buf.Bytes()[i] = byte(rng.Uint32())
	}
	for p := int64(0); p < written/atoll.BlockSize; p += 256 {
		no(t, v.Write(context.Background(), buf, buf.Bytes(), place(v, p, written/atoll.BlockSize), false))
	}
	no(t, v.Checkpoint(context.Background()))
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d)/1e6) }

func TestSpeedOfVersions(t *testing.T) {
	if *speedFlag == "" {
		t.Skip("a measurement: give -speed")
	}
	for _, size := range []int64{4 << 30, 1 << 40} {
		for _, mode := range []Mode{Writethrough, Writeback} {
			written := min(*writtenFlag<<20, size*3/4)
			t.Run(fmt.Sprintf("%dGiB/%v", size>>30, mode), func(t *testing.T) { speedOfVersions(t, size, written, mode) })
		}
	}
}

func speedOfVersions(t *testing.T, size, written int64, mode Mode) {
	dir, err := os.MkdirTemp(*speedFlag, "versions-")
	no(t, err)
	defer os.RemoveAll(dir)
	c := newDiskCluster(t, dir, 0)
	defer c.close()
	m, v := c.volume(t, size, Options{Mode: mode})
	fillVolume(t, v, written)
	l := startLoad(t, v, written, 8)
	time.Sleep(3 * time.Second)
	begun, count := time.Now(), l.count.Load()
	l.worst.Store(0)
	time.Sleep(5 * time.Second)
	t.Logf("without versions: %.0f writes/s, slowest %s", float64(l.count.Load()-count)/time.Since(begun).Seconds(), ms(time.Duration(l.worst.Load())))
	var last uint64
	measure := func(what string, n int, pause time.Duration, fn func() error) {
		var calls, stalls []time.Duration
		for range n {
			time.Sleep(pause)
			no(t, v.Settled(t.Context()))
			l.worst.Store(0)
			begun := time.Now()
			no(t, fn())
			calls = append(calls, time.Since(begun))
			time.Sleep(200 * time.Millisecond)
			stalls = append(stalls, time.Duration(l.worst.Load()))
		}
		slices.Sort(calls)
		slices.Sort(stalls)
		t.Logf("%-8s call p50 %s, max %s; slowest write p50 %s, max %s", what, ms(calls[n/2]), ms(calls[n-1]), ms(stalls[n/2]), ms(stalls[n-1]))
	}
	measure("nothing", 10, 300*time.Millisecond, func() error { return nil })
	measure("backup", 20, 300*time.Millisecond, func() error {
		got, err := v.Backup(t.Context(), BackupOptions{})
		last = got.Number
		return err
	})
	measure("restore", 10, 300*time.Millisecond, func() error { return v.Restore(t.Context(), last) })
	i := 0
	measure("clone", 5, 100*time.Millisecond, func() error {
		i++
		_, err := medium.Clone(t.Context(), c.opts, m, last, catalog.Medium{Name: fmt.Sprint("clone", i), Owner: "root"})
		return err
	})
	l.end()
	no(t, v.Check(t.Context()))
	no(t, v.Close(t.Context()))
	no(t, m.Close(t.Context()))
}

func TestSpeedWithManyVersions(t *testing.T) {
	if *speedFlag == "" {
		t.Skip("a measurement: give -speed")
	}
	dir, err := os.MkdirTemp(*speedFlag, "many-")
	no(t, err)
	defer os.RemoveAll(dir)
	c := newDiskCluster(t, dir, 0)
	defer c.close()
	m, v := c.volume(t, 4<<30, Options{})
	written := int64(1 << 30)
	fillVolume(t, v, written)
	rate := func() float64 {
		l := startLoad(t, v, written, 8)
		defer l.end()
		time.Sleep(2 * time.Second)
		begun, count := time.Now(), l.count.Load()
		time.Sleep(5 * time.Second)
		return float64(l.count.Load()-count) / time.Since(begun).Seconds()
	}
	none := []float64{rate(), rate()}
	begun := time.Now()
	for i := range 1000 {
		if i%100 == 0 {
			put(t, v, pageNo(i), 1)
		}
		_, err := v.Backup(t.Context(), BackupOptions{Name: fmt.Sprint("n", i)})
		no(t, err)
	}
	t.Logf("1000 backups one after the other: %v", time.Since(begun).Round(time.Millisecond))
	t.Logf("%.0f writes/s without versions, %.0f with 1000", none, []float64{rate(), rate()})
	no(t, v.Close(t.Context()))
	no(t, m.Close(t.Context()))
	begun = time.Now()
	m, err = medium.Open(t.Context(), c.opts, m.Info().ID)
	no(t, err)
	v = mustOpen(t, OnMedium(m), Options{})
	t.Logf("open with 1000 versions: %s", ms(time.Since(begun)))
	begun = time.Now()
	for _, p := range v.Versions() {
		no(t, v.DeleteVersion(t.Context(), p.Number))
	}
	for len(v.Versions()) > 0 {
		time.Sleep(10 * time.Millisecond)
	}
	t.Logf("all deleted after %v", time.Since(begun).Round(time.Millisecond))
	no(t, v.Check(t.Context()))
	no(t, v.Close(t.Context()))
	no(t, m.Close(t.Context()))
}

// Endless overwrites of a volume that fills 60 % of the disks, with versions
// coming and going.
func TestSpeedOfSteadyState(t *testing.T) {
	if *speedFlag == "" {
		t.Skip("a measurement: give -speed")
	}
	dir, err := os.MkdirTemp(*speedFlag, "steady-")
	no(t, err)
	defer os.RemoveAll(dir)
	disk := *writtenFlag << 20
	c := newDiskCluster(t, dir, disk)
	defer c.close()
	size := disk * 6 / 10 &^ (1<<20 - 1)
	m, v := c.volume(t, size, Options{Mode: Writeback})
	fillVolume(t, v, size)
	l := startLoad(t, v, size, 32)
	fresh := float64(0)
	for i, total := 0, int64(0); total < 4*size && i < 30; i++ {
		count, moved, begun, out := l.count.Load(), m.Stats().Moved, time.Now(), written(t)
		l.worst.Store(0)
		time.Sleep(2 * time.Second)
		rate := float64(l.count.Load()-count) / time.Since(begun).Seconds()
		fresh = max(fresh, rate)
		user := (l.count.Load() - count) * atoll.BlockSize
		total += user
		st, r := m.Stats(), m.Room()
		t.Logf("%3d: %.0f writes/s (%.2f of the best), slowest %s, amplification %.2f, %.2f of it moved; free %d, coming %d, reclaim %.0f MiB/s, overwritten %.1f times; live %d, stored %d, taken %d, dead %d, waiting %d MiB, %d segments, %d virtual, log %d MiB, checkpoints %d",
			i, rate, rate/fresh, ms(time.Duration(l.worst.Load())), float64(written(t)-out)/float64(max(3*user, 1)), float64(st.Moved-moved)/float64(max(user, 1)), r.Free>>20, r.Coming>>20, v.reclaim.delay.rate/1e6, float64(total)/float64(size),
			st.Live>>20, st.Stored>>20, st.Taken>>20, st.Dead>>20, st.Waiting>>20, st.Segments, st.Virtual, v.Stats().LogBytes>>20, v.stats.checkpoints.Load())
		if t.Failed() {
			break
		}
		if i%8 == 7 {
			_, err := v.Backup(t.Context(), BackupOptions{})
			no(t, err)
		}
		if i%8 == 1 {
			for _, p := range v.Versions() {
				if !p.Hidden() {
					no(t, v.DeleteVersion(t.Context(), p.Number))
				}
			}
		}
	}
	l.end()
	no(t, v.Check(t.Context()))
	no(t, v.Close(t.Context()))
	no(t, m.Close(t.Context()))
}

// written returns what this process has given to disks.
func written(t *testing.T) (n int64) {
	text, err := os.ReadFile("/proc/self/io")
	no(t, err)
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(line, "write_bytes: "); ok {
			n, err = strconv.ParseInt(strings.TrimSpace(v), 10, 64)
			no(t, err)
		}
	}
	return n
}
