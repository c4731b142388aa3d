package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/node"
)

// offlineStart bounds the start of a server for a check.
const offlineStart = 30 * time.Second

// CheckOffline checks media of a server that is stopped, as CheckVolume does of
// one that runs: those named, or all of them, also those in the trash and deleted
// ones that clones need. each gets the outcome of every one, in order; an
// error there means that it could not be checked. Nobody is served meanwhile, and
// at the end the data are as after a clean stop. ErrBusy when a server uses the
// directory, ErrNotExist when there is none of a server, ErrUnsupported when it
// cannot run without the others of its cluster.
func CheckOffline(ctx context.Context, cfg *Config, o Options, names []string, readAll bool, each func(name string, r *atollv1.CheckVolumeResponse, err error)) (err error) {
	if err := offlineHome(cfg); err != nil {
		return err
	}
	o.offline = true
	starting, cancel := context.WithTimeout(ctx, offlineStart)
	defer cancel()
	s, err := Start(starting, cfg, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Stop()) }()
	b := &backend{s: s}
	media, err := b.allMedia(ctx)
	if err != nil {
		return err
	}
	for _, name := range names {
		if !slices.ContainsFunc(media, func(m catalog.Medium) bool { return m.Name == name }) {
			return fmt.Errorf("volume %q: %w", name, atoll.ErrNotExist)
		}
	}
	for _, m := range media {
		if len(names) > 0 && !slices.Contains(names, m.Name) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		r, err := b.check(ctx, m, readAll)
		each(m.Name, r, err)
		s.volumes.closeID(ctx, m.ID)
	}
	return nil
}

// offlineHome refuses what is not the data of one server that can do by itself.
func offlineHome(cfg *Config) error {
	if _, err := os.Stat(filepath.Join(cfg.Data, memberFile)); err != nil {
		return api.WithHint(fmt.Errorf("data directory %s: no server has kept its data here: %w", cfg.Data, atoll.ErrNotExist), "name the directory that the server runs with: --data DIR")
	}
	fs, err := host.OpenDir(cfg.Data)
	if err != nil {
		return fmt.Errorf("data directory %s: %w", cfg.Data, err)
	}
	lock, err := fs.Lock("lock")
	if err != nil {
		return api.WithHint(fmt.Errorf("data directory %s: %w", cfg.Data, err), `a server runs with it; "atoll check" without --data checks a running cluster`)
	}
	if err := lock.Close(); err != nil {
		return err
	}
	_, many := os.Stat(filepath.Join(cfg.Data, etcdDir, "many"))
	_, keeps := os.Stat(filepath.Join(cfg.Data, etcdDir))
	if many == nil || keeps != nil || len(cfg.Etcd) > 0 {
		return api.WithHint(fmt.Errorf("data directory %s: its server cannot run without others of its cluster: %w", cfg.Data, atoll.ErrUnsupported), `start the cluster and use "atoll check" without --data`)
	}
	for _, path := range cfg.disks() {
		if err := usedDisk(path); err != nil {
			return err
		}
	}
	return nil
}

// usedDisk refuses a directory that no storage node has used: a check formats
// nothing.
func usedDisk(path string) error {
	_, err := os.Stat(path)
	if err == nil {
		var dir *host.Dir
		if dir, err = host.OpenDir(path); err == nil {
			_, err = node.ReadIdentity(dir)
		}
	} else if os.IsNotExist(err) {
		err = atoll.ErrNotExist
	}
	if errors.Is(err, atoll.ErrNotExist) {
		return api.WithHint(fmt.Errorf("disk %s: no storage node has kept data there: %w", path, err), "name the directories that the server runs with: --disk DIR for each")
	}
	if err != nil {
		return fmt.Errorf("disk %s: %w", path, err)
	}
	return nil
}

// allMedia lists the volumes that can be opened: live ones, then those in the trash
// and deleted ones that clones need, whose names tell that.
func (b *backend) allMedia(ctx context.Context) ([]catalog.Medium, error) {
	var out []catalog.Medium
	err := b.s.volumes.each(ctx, func(m catalog.Medium) { out = append(out, m) })
	if err != nil {
		return nil, err
	}
	trash, err := b.s.cat.Trashed(ctx, 0, 0)
	if err != nil {
		return nil, err
	}
	for _, m := range trash {
		if m.Kind == catalog.KindVolume {
			out = append(out, goneName(m))
		}
	}
	for after := atoll.MediumID(0); ; {
		gone, err := b.s.cat.Deleting(ctx, after, 100)
		if err != nil {
			return nil, err
		}
		for _, m := range gone {
			if after = m.ID; m.Kind == catalog.KindVolume && m.State == catalog.MediumDetached {
				out = append(out, goneName(m))
			}
		}
		if len(gone) < 100 {
			return out, nil
		}
	}
}
