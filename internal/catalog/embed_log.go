package catalog

import (
	"context"
	"log/slog"
	"sync/atomic"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// zapLogger makes the logger that etcd wants out of ours. etcd's warnings and
// errors become ours; what it says in passing is dropped.
// Once quiet is true it says nothing any more: a member that is being closed
// complains of its own listeners.
func zapLogger(log *slog.Logger, quiet *atomic.Bool) *zap.Logger {
	if log == nil {
		return zap.NewNop()
	}
	return zap.New(slogCore{log.With("part", "etcd"), quiet})
}

// slogCore is a zapcore.Core that writes to slog.
type slogCore struct {
	log   *slog.Logger
	quiet *atomic.Bool
}

// Enabled implements zapcore.LevelEnabler.
func (c slogCore) Enabled(l zapcore.Level) bool { return l >= zapcore.WarnLevel && !c.quiet.Load() }

// With implements zapcore.Core.
func (c slogCore) With(fields []zapcore.Field) zapcore.Core {
	return slogCore{c.log.With(attrs(fields)...), c.quiet}
}

// Check implements zapcore.Core.
func (c slogCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

// firstStart is an error that etcd reports whenever it starts on an empty
// directory; it means nothing.
const firstStart = "failed to update storage version"

// Write implements zapcore.Core. A warning of etcd is seldom one for the user of
// a storage system (a slow disk shows in our own metrics), so it is for
// developers; its errors are ours to heal.
func (c slogCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	level := slog.LevelDebug
	if e.Level >= zapcore.ErrorLevel && e.Message != firstStart {
		level = slog.LevelWarn
	}
	c.log.Log(context.Background(), level, e.Message, attrs(fields)...)
	return nil
}

// Sync implements zapcore.Core.
func (c slogCore) Sync() error { return nil }

func attrs(fields []zapcore.Field) []any {
	enc := zapcore.NewMapObjectEncoder()
	out := make([]any, 0, len(fields))
	for _, f := range fields {
		f.AddTo(enc)
	}
	for _, f := range fields {
		if v, is := enc.Fields[f.Key]; is {
			out = append(out, slog.Any(f.Key, v))
		}
	}
	return out
}
